"""Folding what was added and removed into one base: a version as a build would have made it, without the model.

Keys, values, tokens and documents that count are copied in order, in slices, then indexed anew by what the caller
gives. Killed at any moment it starts over; a version that was published already, but not indexed or activated, is found
and finished.
"""

import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from knnlm.datastore.arrays import ArrayWriter
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.document_table import Row
from knnlm.datastore.files import disk_errors, share, written
from knnlm.datastore.layout import DOCUMENTS, KEYS, TOKENIZER, TOKENS, VALUES, FileRecord
from knnlm.datastore.manifest import FLAT, FORMAT_VERSION, IndexRecord, Manifest
from knnlm.datastore.progress import Clock, Progress, Report, silent
from knnlm.datastore.reader import Datastore, open_segments
from knnlm.datastore.updates.transaction import Activate, begin_update
from knnlm.messages import DomainChange

__all__ = ["Indexing", "compact"]

SLICE_BYTES = 16 << 20  # written and synced at once; at most two slices are in memory

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


class _Run(NamedTuple):
    """Consecutive rows of one part of the version, numbered from 0 there: entries [lo, hi), tokens [first, end)."""

    part: int
    lo: int
    hi: int
    first: int
    end: int

    def joined(self, other: "_Run") -> "_Run | None":
        """Both in one, when `other` follows this one."""
        if (self.part, self.hi, self.end) != (other.part, other.lo, other.first):
            return None
        return self._replace(hi=other.hi, end=other.end)


def _copy(datastore: Datastore, draft: Path, report: Report) -> int:
    """Write what counts into `draft`. Returns how many tokens there are."""
    manifest, table = datastore.manifest, datastore.documents
    parts = list(open_segments(datastore.path, manifest))
    entries = manifest.live_entries
    tokens = manifest.tokens - int(table.lengths[datastore.removed_documents].sum())
    clock = Clock()

    def on_keys(written: int) -> None:
        report(Progress("copy", written, entries, 0, clock.seconds))

    with (
        _Sink(draft / KEYS, (entries, manifest.key_dim), manifest.key_dtype, on_keys) as keys,
        _Sink(draft / VALUES, (entries,), "int32", _unheard) as values,
        _Sink(draft / TOKENS, (tokens,), "int32", _unheard) as copied,
    ):
        for run in _runs(datastore, draft / DOCUMENTS):
            part = parts[run.part]
            keys.add(part.keys[run.lo : run.hi])
            values.add(part.values[run.lo : run.hi])
            copied.add(part.tokens[run.first : run.end])
    return tokens


def _runs(datastore: Datastore, listed: Path) -> Iterator[_Run]:
    """What to copy, in order; the documents it is of are listed in the file `listed`, durable at the end."""
    table = datastore.documents
    sizes = np.cumsum([(0, 0), *((size.entries, size.tokens) for size in table.sizes)], axis=0)  # (parts + 1, 2)
    run: _Run | None = None
    start = 0
    with written(listed) as lines:
        for document, row in datastore.live_rows():
            with disk_errors(listed):
                lines.write(Row(row.id, start, row.tokens).line())
            start += row.tokens
            part = table.part(document)
            lo, first = int(table.first_entries[document] - sizes[part, 0]), int(row.start - sizes[part, 1])
            new = _Run(part, lo, lo + row.entries, first, first + row.tokens)
            longer = None if run is None else run.joined(new)
            if run is not None and longer is None:
                yield run
            run = longer or new
    if run is not None:
        yield run


class _Sink:
    """An array that is written from its first row to its last. Rows are gathered, since every write is synced."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str, on_written: Callable[[int], None]) -> None:
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
            if self._rows >= self._slice:
                self._write()

    def _write(self) -> None:
        if self._waiting:
            self._array.write(self._written, np.concatenate(self._waiting))
        self._written += self._rows
        self._waiting, self._rows = [], 0
        self._on_written(self._written)


def _without_indexes(manifest: Manifest) -> Manifest:
    """What compacting makes of a version before it is indexed."""
    named = {index.file for index in manifest.indexes}
    files = {name: record for name, record in manifest.files.items() if name not in named}
    return manifest.model_copy(update={"index": IndexRecord(recipe=FLAT), "other_indexes": (), "files": files})


def _unheard(written: int) -> None:
    del written
