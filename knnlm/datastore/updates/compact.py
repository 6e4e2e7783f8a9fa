"""Folding what was added and removed into one base: a version as a build would have made it, without the model.

Keys, values, tokens and documents that count are copied in order, in slices, then indexed anew by what the caller
gives. Killed at any moment it starts over; a version that was published already, but not indexed or activated, is found
and finished.
"""

import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from knnlm.datastore.arrays import ArrayWriter
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.document_table import Row, read_rows
from knnlm.datastore.files import disk_errors, share, written
from knnlm.datastore.layout import DOCUMENTS, KEYS, TOKENIZER, TOKENS, VALUES, FileRecord, segment_files
from knnlm.datastore.manifest import FLAT, FORMAT_VERSION, IndexRecord, Manifest
from knnlm.datastore.progress import Clock, Progress, Report, silent
from knnlm.datastore.reader import Datastore, open_segments
from knnlm.datastore.updates.transaction import Activate, begin_update
from knnlm.messages import DomainChange

SLICE_BYTES = 16 << 20  # written and synced at once; at most two slices are in memory
MAX_WAITING = 65_536  # pieces of arrays, however small

Array = npt.NDArray[Any]  # Any: float16, float32 or int32
Indexing = Callable[[Path, str], None]  # a version's folder, and the recipe of the default index before


def compact(
    catalog: Catalog,
    domain: str,
    *,
    index: Indexing,
    activate: Activate | None = None,
    wait: bool = False,
    on_progress: Report | None = None,
) -> DomainChange:
    """Publish the documents that count in the current version of `domain` as one that never grew, `index` it, then
    `activate(domain, version, parent)`.

    index: gives the published version its index; it is called again for one that has it already. The tuning is kept;
    indexes beside the default one are not built again. A version without anything to fold stays: then the result names
    it as both version and parent. Every byte that is copied is compared with its checksum first.

    Raises UnknownDomain; UnknownVersion when no version is current; Conflict when another process is changing the
    domain, unless it is to `wait`, or when the domain was switched meanwhile (the version is published and not
    activated); DatastoreCorrupt; DatastoreError when the disk is full; and what `index` (the version is published by
    then, and not activated) and `activate` raise.
    """
    report = on_progress or silent
    with begin_update(catalog, domain, wait=wait) as update:
        old = update.manifest
        if old.format_version == FORMAT_VERSION:
            return DomainChange(domain, update.version, update.version)
        with update.scratch() as draft:
            path = update.publish(draft, _folded(update.path, draft, report), essence=_without_indexes)
        index(path, old.index.recipe)
        update.activate(path, activate)
    return DomainChange(domain, path.name, update.version)


def _folded(path: Path, draft: Path, report: Report) -> Manifest:
    """Copy what counts of the version in folder `path` to `draft`. Returns its manifest, as far as it is known."""
    datastore = Datastore.open(path, check="all")
    tokens = _copy(datastore, draft, report)
    datastore.close()
    share(path / TOKENIZER, draft / TOKENIZER)
    old = Manifest.load(path)  # again: it may have been tuned meanwhile
    return old.model_copy(
        update={
            "format_version": FORMAT_VERSION,
            "created": datetime.now(UTC),
            "entries": old.live_entries,
            "documents": old.live_documents,
            "tokens": tokens,
            "index": IndexRecord(recipe=FLAT),
            "other_indexes": (),
            "files": {name: FileRecord.of(draft / name) for name in (KEYS, VALUES, TOKENS, DOCUMENTS, TOKENIZER)},
            "segments": (),
            "removed": None,
            "parent": None,
        }
    )


def _copy(datastore: Datastore, draft: Path, report: Report) -> int:
    """Write what counts into `draft`, document by document. Returns how many tokens there are."""
    manifest = datastore.manifest
    gone = np.zeros(manifest.documents, np.bool_)
    gone[datastore.removed_documents] = True
    entries, tokens = manifest.live_entries, int(datastore.documents.lengths[~gone].sum())
    clock = Clock()

    def on_keys(written: int) -> None:
        report(Progress("copy", written, entries, 0, clock.seconds))

    with (
        _Sink(draft / KEYS, (entries, manifest.key_dim), manifest.key_dtype, on_keys) as keys,
        _Sink(draft / VALUES, (entries,), "int32") as values,
        _Sink(draft / TOKENS, (tokens,), "int32") as copied,
        written(draft / DOCUMENTS) as lines,
    ):
        document = start = 0
        for part in open_segments(datastore.path, manifest):
            lo = 0  # the document's first entry in this part
            for row in read_rows(datastore.path / segment_files(part.number).documents):
                if not gone[document]:
                    keys.add(part.keys[lo : lo + row.entries])
                    values.add(part.values[lo : lo + row.entries])
                    copied.add(part.tokens[row.start : row.start + row.tokens])
                    with disk_errors(draft / DOCUMENTS):
                        lines.write(Row(row.id, start, row.tokens).line())
                    start += row.tokens
                lo += row.entries
                document += 1
    return tokens


class _Sink:
    """An array that is written from its first row to its last. Rows are gathered, since every write is synced."""

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: str, on_written: Callable[[int], None] | None = None
    ) -> None:
        little = np.dtype(dtype).newbyteorder("<")
        self._array = ArrayWriter(path, shape, little)
        self._slice = max(1, SLICE_BYTES // (little.itemsize * math.prod(shape[1:])))  # rows
        self._on_written = on_written
        self._waiting: list[Array] = []
        self._rows = self._written = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._array:
            if kind is None:
                self._write()

    def add(self, rows: Array) -> None:
        for lo in range(0, len(rows), self._slice):
            self._waiting.append(rows[lo : lo + self._slice])
            self._rows += len(self._waiting[-1])
            if self._rows >= self._slice or len(self._waiting) >= MAX_WAITING:
                self._write()

    def _write(self) -> None:
        if self._waiting:
            self._array.write(self._written, np.concatenate(self._waiting))
        self._written += self._rows
        self._waiting, self._rows = [], 0
        if self._on_written is not None:
            self._on_written(self._written)


def _without_indexes(manifest: Manifest) -> Manifest:
    """What compacting makes of a version before it is indexed."""
    named = {index.file for index in manifest.indexes}
    files = {name: record for name, record in manifest.files.items() if name not in named}
    return manifest.model_copy(update={"index": IndexRecord(recipe=FLAT), "other_indexes": (), "files": files})
