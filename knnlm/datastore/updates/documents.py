"""Adding documents to a version and removing documents from it: a new version, which shares all that stays the same.

What is added becomes a segment (layout.py) with files of its own, made as a build makes them; what is removed is listed
(its tombstones) and stays stored. Only the list of documents is read of what is there already. compact.py folds what
either leaves behind.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from knnlm.datastore.arrays import ArrayWriter
from knnlm.datastore.build import check_sizes, check_tokenizer, encode, tokenize
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.corpus import Sources
from knnlm.datastore.document_table import DocumentTable, read_rows
from knnlm.datastore.files import discard, disk_errors, share, sync_folder
from knnlm.datastore.layout import DOCUMENTS, KEYS, REMOVED, TOKENS, VALUES, FileRecord, segment_files
from knnlm.datastore.manifest import GROWN_VERSION, Manifest, RemovedRecord, SegmentRecord
from knnlm.datastore.progress import Progress, Report, silent
from knnlm.datastore.reader import Datastore
from knnlm.datastore.updates.transaction import (
    ADDING,
    Activate,
    UpdateTransaction,
    advice,
    begin_update,
    remove_leftovers,
)
from knnlm.datastore.workspace import BUILDING, Identity, Workspace, working_in
from knnlm.errors import Conflict, DatastoreMismatch, InvalidRequest, NotFound
from knnlm.messages import Document, DomainChange
from knnlm.protocols import LanguageModel

MAX_NAMED_IDS = 5  # that an error lists

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
    lm: LanguageModel,
    catalog: Catalog,
    domain: str,
    *,
    replace: bool = False,
    activate: Activate | None = None,
    wait: bool = False,
    batch_tokens: int = 8192,
    part_entries: int = 16_384,
    on_progress: Report | None = None,
) -> DomainChange:
    """Publish a version that has `documents` besides what the current one has, and activate it by
    `activate(domain, version, parent)`.

    lm: the model that made the domain; windows, key function and dtype are those it was built with. replace: documents
    that have the id of a new one are removed by the same update. wait: for another update of the domain to end.
    batch_tokens, part_entries: as in `build`. Documents without tokens to predict are listed and have no entries.

    Stopped at any moment, the same call continues with the keys that are finished already. Raises UnknownDomain;
    UnknownVersion when no version is current; DatastoreMismatch, with both values, for another model or dtype;
    InvalidRequest when there is no document; Conflict when an id is given twice, or exists without `replace`, when
    another process is changing the domain, or when it was switched meanwhile (then the version is published, not
    activated); DatastoreError as `build` does; and what `activate` raises.
    """
    check_sizes(batch_tokens=batch_tokens, part_entries=part_entries)
    report = on_progress or silent
    with begin_update(catalog, domain, wait=wait) as update:
        datastore = Datastore.open(update.path, expect=lm.info)
        identity = _inherited(update, lm)
        with update.scratch() as folder:
            sources = tokenize(documents, lm, folder, report, parse_special=identity.windows.parse_special)
            if not sources.documents:
                raise InvalidRequest("there is no document to add", param="documents")
            gone = _replaced(datastore, folder / DOCUMENTS, update, replace=replace)
            workspace = update.folder / f"{ADDING}{_name(identity, sources)}{BUILDING}"
            with working_in(workspace, identity, doing="adding these documents") as space:
                remove_leftovers(update.folder)
                _take(space, sources, folder)
                files = space.completed_files()
                if files is None:
                    encode(lm, space, sources, batch_tokens=batch_tokens, part_entries=part_entries, report=report)
                    files = space.complete_files((KEYS, VALUES))
                report(Progress("publish", sources.entries, sources.entries, 0, 0.0))
                for name in (TOKENS, DOCUMENTS):
                    files[name] = FileRecord.of(workspace / name)
                path, manifest = _published(update, gone, _Segment(workspace, sources, files))
                update.activate(path, activate)
                discard(workspace)
    return DomainChange(
        domain, path.name, update.version, sources.documents, sources.entries, len(gone.documents), gone.entries,
        advice(manifest),
    )  # fmt: skip


def remove(
    ids: Iterable[str], catalog: Catalog, domain: str, *, activate: Activate | None = None, wait: bool = False
) -> DomainChange:
    """Publish a version without the documents of these ids, then `activate(domain, version, parent)`.

    All documents of an id go; an id given twice counts once; nothing need be left. Raises NotFound, which names up to
    five, when the current version has no document of an id: then nothing is done. Else as `add` does.
    """
    wanted = list(dict.fromkeys(ids))
    if not wanted:
        raise InvalidRequest("there is no id of a document to remove", param="ids")
    with begin_update(catalog, domain, wait=wait) as update:
        datastore = Datastore.open(update.path)
        numbers = [datastore.documents.numbers(name) for name in wanted]
        unknown = [name for name, found in zip(wanted, numbers, strict=True) if not len(found)]
        if unknown:
            raise NotFound(
                f"domain {domain} version {update.version} has no document {_listed(unknown)}: nothing was removed",
                param="ids",
            )
        gone = _gone(datastore, np.concatenate(numbers))
        path, manifest = _published(update, gone, None)
        update.activate(path, activate)
    return DomainChange(
        domain, path.name, update.version,
        removed_documents=len(gone.documents), removed_entries=gone.entries, advice=advice(manifest),
    )  # fmt: skip


def _inherited(update: UpdateTransaction, lm: LanguageModel) -> Identity:
    """What the segment's keys are made by: the same as all others of the version."""
    check_tokenizer(lm)
    manifest = update.manifest
    if manifest.model.dtype not in (None, lm.info.dtype):
        raise DatastoreMismatch(
            f"the keys of {update.path} were made in {manifest.model.dtype}, model {lm.info.model_id} runs in "
            f"{lm.info.dtype}: documents are added in the dtype of all others",
            param="dtype",
        )
    if lm.info.context_length < manifest.windows.context_length:
        raise DatastoreMismatch(
            f"{update.path} was made with windows of {manifest.windows.context_length} tokens, "
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


def _replaced(datastore: Datastore, table: Path, update: UpdateTransaction, *, replace: bool) -> _Gone:
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
                f"domain {update.domain} version {update.version} has a document {_short(row.id)} already: "
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


def _published(update: UpdateTransaction, gone: _Gone, segment: _Segment | None) -> tuple[Path, Manifest]:
    """The current version with `segment`, without what is `gone`, published. Returns (its folder, its manifest)."""
    with update.scratch() as draft:
        old = update.share(draft, without=(REMOVED,) if len(gone.documents) else ())
        manifest = old if segment is None else _with_segment(old, segment, draft)
        if len(gone.documents):
            manifest = _with_tombstones(manifest, gone, draft)
        now = {"format_version": GROWN_VERSION, "parent": update.version, "created": datetime.now(UTC)}
        manifest = manifest.model_copy(update=now)
        return update.publish(draft, manifest), manifest


def _with_segment(old: Manifest, segment: _Segment, draft: Path) -> Manifest:
    """The manifest after `segment`, whose files are given to the folder `draft`."""
    number = max((s.number for s in old.segments), default=0) + 1
    files = dict(old.files)
    for name, as_base in zip(segment_files(number), segment_files(0), strict=True):
        share(segment.folder / as_base, draft / name)
        files[name] = segment.files[as_base]
    made = segment.sources
    record = SegmentRecord(number=number, entries=made.entries, documents=made.documents, tokens=made.tokens)
    return old.model_copy(
        update={
            "segments": (*old.segments, record),
            "entries": old.entries + made.entries,
            "documents": old.documents + made.documents,
            "tokens": old.tokens + made.tokens,
            "files": files,
        }
    )


def _with_tombstones(old: Manifest, gone: _Gone, draft: Path) -> Manifest:
    """The manifest without what is `gone`, of which the list is written into the folder `draft`."""
    removed = np.union1d(gone.before, gone.documents)  # (m,) int64 ascending
    with ArrayWriter(draft / REMOVED, removed.shape, "<i8") as array:
        array.write(0, removed)
    entries = gone.entries + (0 if old.removed is None else old.removed.entries)
    return old.model_copy(
        update={
            "removed": RemovedRecord(documents=len(removed), entries=entries),
            "files": {**old.files, REMOVED: FileRecord.of(draft / REMOVED)},
        }
    )


def _listed(ids: Sequence[str]) -> str:
    rest = len(ids) - MAX_NAMED_IDS
    return ", ".join(_short(name) for name in ids[:MAX_NAMED_IDS]) + (f" and {rest} more" if rest > 0 else "")


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:79] + "…")
