"""Adding documents to a version and removing documents from it: a new version, which shares all that stays the same.

What is added becomes a segment (layout.py) with files of its own, made as a build makes them; what is removed is listed
and stays stored. Of what is there already only the list of documents is read. What either leaves behind is folded by
knnlm.index.compact.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from knnlm.datastore.arrays import ArrayWriter
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.change import ADDING, Activate, Change, Changing, advice, changing, remove_leftovers
from knnlm.datastore.corpus import Sources
from knnlm.datastore.documents import DocumentTable, read_rows
from knnlm.datastore.encode import KeyEncoder
from knnlm.datastore.files import discard, disk_errors, share, sync_folder
from knnlm.datastore.layout import DOCUMENTS, KEYS, REMOVED, TOKENS, VALUES, segment_files
from knnlm.datastore.manifest import GROWN_VERSION, FileRecord, Manifest, RemovedRecord, SegmentRecord
from knnlm.datastore.phases import check_sizes, check_tokenizer, encode, tokenize
from knnlm.datastore.progress import Progress, Report, silent
from knnlm.datastore.reader import Datastore
from knnlm.datastore.workspace import BUILDING, Identity, Workspace, recorded, working_in
from knnlm.errors import Conflict, DatastoreMismatch, InvalidRequest, NotFound
from knnlm.messages import Document

__all__ = ["Change", "add", "remove"]

NAMED = 5  # ids that an error lists

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Segment:
    """What is added: its files, named as those of a base, in `folder`."""

    folder: Path
    sources: Sources
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class _Gone:
    """documents: (m,) numbers, ascending. entries: that these have. before: (r,) those that did not count already."""

    documents: Int64
    entries: int
    before: Int64


def add(
    documents: Iterable[Document],
    lm: KeyEncoder,
    catalog: Catalog,
    domain: str,
    *,
    replace: bool = False,
    activate: Activate | None = None,
    wait: bool = False,
    batch_tokens: int = 8192,
    part_entries: int = 16_384,
    on_progress: Report | None = None,
) -> Change:
    """Publish a version that has `documents` besides what the current one has, and activate it by
    `activate(domain, version, parent)`.

    lm: the model that made the domain; windows, key function and dtype are those it was built with. replace: documents
    that have the id of a new one are removed by the same change. wait: for another change of the domain to end.
    batch_tokens, part_entries: as in `build`. Documents without tokens to predict are listed and have no entries.

    Stopped at any moment, the same call continues with the keys that are finished already. Raises UnknownDomain;
    UnknownVersion when no version is current; DatastoreMismatch, with both values, for another model or dtype;
    InvalidRequest when there is no document; Conflict when an id is given twice, or exists without `replace`, when
    another process is changing the domain, or when it was switched meanwhile (then the version is published, not
    activated); DatastoreError as `build` does; and what `activate` raises.
    """
    check_sizes(batch_tokens=batch_tokens, part_entries=part_entries)
    report = on_progress or silent
    with changing(catalog, domain, wait=wait) as change:
        datastore = Datastore.open(change.path, expect=lm.info)
        identity = _inherited(change, lm)
        with change.scratch() as folder:
            sources = tokenize(documents, lm, folder, report, parse_special=identity.windows.parse_special)
            if not sources.documents:
                raise InvalidRequest("there is no document to add", param="documents")
            gone = _replaced(datastore, folder / DOCUMENTS, change, replace=replace)
            workspace = change.folder / f"{ADDING}{_name(identity, sources)}{BUILDING}"
            with working_in(workspace, identity, doing="adding these documents") as space:
                remove_leftovers(change.folder)
                _take(space, sources, folder)
                files = space.completed_files()
                if files is None:
                    encode(lm, space, sources, batch_tokens=batch_tokens, part_entries=part_entries, report=report)
                    files = space.complete_files((KEYS, VALUES))
                report(Progress("publish", sources.entries, sources.entries, 0, 0.0))
                for name in (TOKENS, DOCUMENTS):
                    files[name] = recorded(workspace / name)
                path, manifest = _published(change, gone, _Segment(workspace, sources, files))
                change.activate(path, activate)
                discard(workspace)
    return Change(
        domain, path.name, change.version, path, sources.documents, sources.entries, len(gone.documents), gone.entries,
        advice(manifest),
    )  # fmt: skip


def remove(
    ids: Iterable[str], catalog: Catalog, domain: str, *, activate: Activate | None = None, wait: bool = False
) -> Change:
    """Publish a version without the documents of these ids, then `activate(domain, version, parent)`.

    All documents of an id go; an id given twice counts once; nothing need be left. Raises NotFound, which names up to
    five, when the current version has no document of an id: then nothing is done. Else as `add` does.
    """
    wanted = list(dict.fromkeys(ids))
    if not wanted:
        raise InvalidRequest("there is no id of a document to remove", param="ids")
    with changing(catalog, domain, wait=wait) as change:
        datastore = Datastore.open(change.path)
        numbers = [datastore.documents.numbers(name) for name in wanted]
        unknown = [name for name, found in zip(wanted, numbers, strict=True) if not len(found)]
        if unknown:
            raise NotFound(
                f"domain {domain} version {change.version} has no document {_listed(unknown)}: nothing was removed",
                param="ids",
            )
        gone = _gone(datastore, np.concatenate(numbers))
        path, manifest = _published(change, gone, None)
        change.activate(path, activate)
    return Change(
        domain, path.name, change.version, path,
        removed_documents=len(gone.documents), removed_entries=gone.entries, advice=advice(manifest),
    )  # fmt: skip


def _inherited(change: Changing, lm: KeyEncoder) -> Identity:
    """What the segment's keys are made by: the same as all others of the version."""
    check_tokenizer(lm)
    manifest = change.manifest
    if manifest.model.dtype not in (None, lm.info.dtype):
        raise DatastoreMismatch(
            f"the keys of {change.path} were made in {manifest.model.dtype}, model {lm.info.model_id} runs in "
            f"{lm.info.dtype}: documents are added in the dtype of all others",
            param="dtype",
        )
    if lm.info.context_length < manifest.windows.context_length:
        raise DatastoreMismatch(
            f"{change.path} was made with windows of {manifest.windows.context_length} tokens, "
            f"model {lm.info.model_id} takes {lm.info.context_length}",
            param="context_length",
        )
    return Identity(
        model=manifest.model,
        key_function=manifest.key_function,
        key_dim=manifest.key_dim,
        key_dtype=manifest.key_dtype,
        windows=manifest.windows,
    )


def _replaced(datastore: Datastore, table: Path, change: Changing, *, replace: bool) -> _Gone:
    """The documents that those listed in `table` take the place of."""
    given = DocumentTable(table)
    old = [np.empty(0, np.int64)]
    for row in read_rows(table):
        if len(given.numbers(row.id)) > 1:
            raise Conflict(
                f"two of the documents have the id {_short(row.id)}: expected one of each", param="documents"
            )
        found = datastore.documents.numbers(row.id)
        if not len(found):
            continue
        if not replace:
            raise Conflict(
                f"domain {change.domain} version {change.version} has a document {_short(row.id)} already: "
                "replace it, or remove it first",
                param="documents",
            )
        old.append(found)
    return _gone(datastore, np.concatenate(old))


def _gone(datastore: Datastore, numbers: Int64) -> _Gone:
    starts, ends = datastore.documents.spans(numbers)
    return _Gone(np.unique(numbers), int((ends - starts).sum()), datastore.removed_documents)


def _name(identity: Identity, sources: Sources) -> str:
    """The same for the same documents and keys, whatever version they are added to: other work does not lose it."""
    return hashlib.sha256(f"{identity.model_dump_json()} {sources.sha256}".encode()).hexdigest()[:16]


def _take(space: Workspace, sources: Sources, folder: Path) -> None:
    """Put what was tokenized just now into the workspace: it is what an earlier run has put there."""
    with disk_errors(space.folder):
        for name in (TOKENS, DOCUMENTS):
            (folder / name).replace(space.folder / name)
        sync_folder(space.folder)
    if space.state.sources is None:
        space.complete_sources(sources)
    else:
        space.check_sources(sources.sha256)


def _published(change: Changing, gone: _Gone, segment: _Segment | None) -> tuple[Path, Manifest]:
    """The current version with `segment`, without what is `gone`, published. Returns (its folder, its manifest)."""
    with change.scratch() as draft:
        old = change.share(draft, without=(REMOVED,) if len(gone.documents) else ())
        fields = old.model_dump() | {"format_version": GROWN_VERSION, "parent": change.version}
        files = dict(old.files)
        if segment is not None:
            number = max((s.number for s in old.segments), default=0) + 1
            for name, as_base in zip(segment_files(number), segment_files(0), strict=True):
                share(segment.folder / as_base, draft / name)
                files[name] = segment.files[as_base]
            made = segment.sources
            fields["segments"] = (
                *old.segments,
                SegmentRecord(number=number, entries=made.entries, documents=made.documents, tokens=made.tokens),
            )
            for name in ("entries", "documents", "tokens"):
                fields[name] += getattr(made, name)
        if len(gone.documents):
            removed = np.union1d(gone.before, gone.documents)  # (m,) int64 ascending
            with ArrayWriter(draft / REMOVED, removed.shape, "<i8") as array:
                array.write(0, removed)
            files[REMOVED] = recorded(draft / REMOVED)
            before = 0 if old.removed is None else old.removed.entries
            fields["removed"] = RemovedRecord(documents=len(removed), entries=before + gone.entries)
        fields["files"] = files
        del fields["created"]
        manifest = Manifest.model_validate(fields)
        return change.publish(draft, manifest), manifest


def _listed(ids: Sequence[str]) -> str:
    rest = len(ids) - NAMED
    return ", ".join(_short(name) for name in ids[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:79] + "…")
