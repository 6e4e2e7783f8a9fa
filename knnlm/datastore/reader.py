"""A published version, opened: its arrays as read-only maps, and the text around an entry.

A version that has grown holds more than it was built from: segments that were added, and documents that do not count
any more (docs/datastore.md). One of shards is read as if its first shard were the base and the others were added.
Documents, entries and tokens are numbered through all of it.

Opening is cheap, whatever the size: sizes and headers are compared with the manifest, contents are not (that is
verify.py, or `check`); only where documents were removed is the table of all documents read. Immutable and safe for any
number of threads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Self

import numpy as np
import numpy.typing as npt

from knnlm.datastore.arrays import open_array
from knnlm.datastore.document_table import DocumentTable, Int64, Row, Sizes, read_rows
from knnlm.datastore.layout import REMOVED, Checksums, SegmentFiles, require_unchanged, segment_files
from knnlm.datastore.manifest import FORMAT_VERSION, Manifest, ShardRecord
from knnlm.errors import DatastoreCorrupt, DatastoreMismatch, InvalidRequest
from knnlm.messages import ModelInfo, Passage, differs

Keys = npt.NDArray[np.floating]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Segment:
    """The arrays of one segment: 0 is the base, which a version was built from, the others were added to it; or of one
    shard, the first being 0.

    keys: (n, d) float16 or float32. values: (n,) int32. tokens: (t,) int32. All read-only maps, numbered from 0.
    """

    number: int
    keys: Keys
    values: Int32
    tokens: Int32


class Datastore:
    """keys: (n, d) float16 or float32. values: (n,) int32. tokens: (t,) int32, all documents one after another. These
    are the base's, which every index is built from. segments: what was added to it. removed: the entries of documents
    that do not count any more, as starts and ends: [starts[i], ends[i]) ascending, disjoint, none empty.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        keys: Keys,
        values: Int32,
        tokens: Int32,
        segments: Sequence[Segment] = (),
        removed_documents: Int64 | None = None,
    ) -> None:
        """removed_documents: (m,) int64 ascending. Raises DatastoreCorrupt when the manifest counts others."""
        self.path = path
        self.manifest = manifest
        self.keys = keys
        self.values = values
        self.tokens = tokens
        self.segments = tuple(segments)
        self.removed_documents = np.empty(0, np.int64) if removed_documents is None else removed_documents
        self._documents: DocumentTable | None = None
        self._lock = Lock()
        parts = [(len(values), len(tokens)), *((len(s.values), len(s.tokens)) for s in self.segments)]
        # (parts + 1,) each: where the parts begin, then the totals
        self._first_entries, self._first_tokens = np.cumsum([(0, 0), *parts], axis=0).T
        self.removed = (np.empty(0, np.int64), np.empty(0, np.int64))
        if len(self.removed_documents):
            self.removed = _entry_ranges(path, manifest, self.documents, self.removed_documents)

    @classmethod
    def open(cls, path: Path, *, expect: ModelInfo | None = None, check: Checksums = "none") -> Self:
        """The version in folder `path`.

        check: whose sha256 to compare before anything is read, see `layout.require_unchanged`. Raises
        DatastoreIncomplete for one that is being built, DatastoreCorrupt where a file is missing, has another size or
        is no such array, and DatastoreMismatch, with both values, when the model `expect` did not make it.
        """
        manifest = Manifest.load(path)
        if expect is not None:
            _refuse_other_model(path, manifest, expect)
        for folder, part in [
            (path, manifest),
            *((path / s.name, load_shard(path, manifest, s)) for s in manifest.shards),
        ]:
            _require_sizes(folder, part)
            require_unchanged(folder, part.files, check)
        base, *added = open_segments(path, manifest)
        return cls(path, manifest, base.keys, base.values, base.tokens, added, _read_tombstones(path, manifest))

    @property
    def entries(self) -> int:
        """Entries that are stored, in the base and in every segment, removed ones included."""
        return self.manifest.entries

    @property
    def documents(self) -> DocumentTable:
        """The documents of all segments, read on first use: a search that shows no text never needs them. Raises
        DatastoreCorrupt."""
        with self._lock:
            if self._documents is None:
                parts = _parts(self.path, self.manifest)
                table = DocumentTable(*(part.documents for part in parts), removed=self.removed_documents)
                for part, found in zip(parts, table.sizes, strict=True):
                    if found != part.sizes:
                        raise DatastoreCorrupt(f"{part.documents} has {found}, expected {part.sizes}")
                self._documents = table
            return self._documents

    def added_keys(self) -> Keys:
        """(m, d) keys of all segments, in the base's dtype; m = 0 without any. A copy when there are several."""
        if len(self.segments) == 1:
            return self.segments[0].keys
        return np.concatenate([np.asarray(keys) for keys in (self.keys[:0], *(s.keys for s in self.segments))])

    def added_values(self) -> Int32:
        """(m,) values of the entries of `added_keys`."""
        if len(self.segments) == 1:
            return self.segments[0].values
        return np.concatenate([np.asarray(values) for values in (self.values[:0], *(s.values for s in self.segments))])

    def values_of(self, ids: Int64) -> Int32:
        """Values of entries of any segment, -1 where the id is -1; of the shape of ids.

        Raises InvalidRequest for an entry that does not exist.
        """
        self._refuse_unknown(ids[ids != -1])
        found = np.full(ids.shape, -1, np.int32)
        for values, first in zip((self.values, *(s.values for s in self.segments)), self._first_entries, strict=False):
            here = (ids >= first) & (ids < first + len(values))
            found[here] = values[ids[here] - first]
        return found

    def parts_of_keys(self) -> Iterator[tuple[int, Keys]]:
        """The base and every segment: the number of its first entry, and its keys (m, d)."""
        yield from zip(self._first_entries, (self.keys, *(s.keys for s in self.segments)), strict=False)

    def keys_of(self, ids: Int64) -> npt.NDArray[np.float32]:
        """(n, d) keys of entries (n,) of any segment. Raises InvalidRequest for an entry that does not exist."""
        self._refuse_unknown(ids)
        found = np.empty((len(ids), self.manifest.key_dim), np.float32)
        for first, keys in self.parts_of_keys():
            here = (ids >= first) & (ids < first + len(keys))
            found[here] = keys[ids[here] - first]
        return found

    def live_entries(self) -> Int64:
        """(n,) ascending: the entries that count. 8 bytes each."""
        gone = np.zeros(self.entries, np.bool_)
        for start, end in zip(*(edges.tolist() for edges in self.removed), strict=True):
            gone[start:end] = True
        return np.flatnonzero(~gone)

    def document_of(self, entries: npt.NDArray[np.integer]) -> tuple[Int64, Int64]:
        """(n,) document numbers and (n,) places of the values in their documents, in tokens.

        Raises InvalidRequest for an entry that does not exist.
        """
        self._refuse_unknown(entries)
        return self.documents.locate(entries)

    def tokens_of(self, document: int, start: int = 0, end: int | None = None) -> Int32:
        """A document's tokens [start, end), all by default; a view of the file."""
        table = self.documents
        part = table.part(document)
        stored = self.segments[part - 1].tokens if part else self.tokens
        at, length = int(table.starts[document] - self._first_tokens[part]), int(table.lengths[document])
        return stored[at + start : at + (length if end is None else min(end, length))]

    def live_rows(self) -> Iterator[tuple[int, Row]]:
        """(number, row) of the documents that count, in order. A row's `start` counts through all segments.

        Raises DatastoreCorrupt.
        """
        gone = np.zeros(len(self.documents), np.bool_)
        gone[self.removed_documents] = True
        document = 0
        for part, first in zip(_parts(self.path, self.manifest), self._first_tokens.tolist(), strict=False):
            for row in read_rows(part.documents):
                if not gone[document]:
                    yield document, replace(row, start=first + row.start)
                document += 1

    def passage(self, entry: int, before: int, after: int) -> Passage:
        """The text around an entry: the last `before` tokens of its context, then `after` tokens from its value on.

        Less where the document begins or ends: another document's tokens are never shown. Raises InvalidRequest for
        an entry that does not exist or negative numbers, DatastoreCorrupt for a token that the model does not have.
        """
        return self.passages(np.array([entry], np.int64), before, after)[0]

    def passages(self, entries: Int64, before: int, after: int) -> list[Passage]:
        """`passage` of each of entries (m,), in their order. Raises as it does."""
        if before < 0 or after < 0:
            raise InvalidRequest(f"before and after must be >= 0, got {before} and {after}", param="passage_tokens")
        documents, positions = self.document_of(entries)
        names = {document: self.documents.id(document) for document in set(documents.tolist())}  # each reads a file
        places = zip(entries.tolist(), documents.tolist(), positions.tolist(), strict=True)
        return [self._passage(entry, document, position, before, after, names) for entry, document, position in places]

    def _passage(
        self, entry: int, document: int, position: int, before: int, after: int, names: Mapping[int, str]
    ) -> Passage:
        shown = np.array(self.tokens_of(document, max(0, position - before), position + after))
        if len(shown) and not (shown.min() >= 0 and shown.max() < self.manifest.model.vocab_size):
            raise DatastoreCorrupt(
                f"{self.path}: the text of entry {entry} has tokens in [{shown.min()}, {shown.max()}], "
                f"expected [0, {self.manifest.model.vocab_size})"
            )
        context = min(before, position)
        return Passage(
            document=names[document],
            entry=entry,
            position=position,
            before=shown[:context],
            after=shown[context:],
        )

    def close(self) -> None:
        """Let go of the maps; they are unmapped when nobody holds an array of them any more."""
        self.keys = np.empty((0, self.manifest.key_dim), self.manifest.key_dtype)
        self.values = self.tokens = np.empty(0, np.int32)
        self.segments = ()

    def _refuse_unknown(self, entries: npt.NDArray[np.integer]) -> None:
        wrong = entries[(entries < 0) | (entries >= self.entries)]
        if len(wrong):
            raise InvalidRequest(f"no entry {wrong[0]}: expected [0, {self.entries})", param="entries")


def open_segments(path: Path, manifest: Manifest) -> Iterator[Segment]:
    """The base and all segments of the version in folder `path`, or its shards. Raises DatastoreCorrupt as `open_array`
    does."""
    key_dtype = np.dtype(manifest.key_dtype).newbyteorder("<")
    for part in _parts(path, manifest):
        yield Segment(
            part.number,
            open_array(part.folder / part.names.keys, (part.sizes.entries, manifest.key_dim), key_dtype),
            open_array(part.folder / part.names.values, (part.sizes.entries,), "<i4"),
            open_array(part.folder / part.names.tokens, (part.sizes.tokens,), "<i4"),
        )


def load_shard(path: Path, manifest: Manifest, shard: ShardRecord) -> Manifest:
    """The manifest of one shard of the version in folder `path`. Raises DatastoreCorrupt when it is missing, damaged or
    not the shard that was published."""
    found = Manifest.load(path / shard.name)
    if found.format_version != FORMAT_VERSION or (found.domain, found.version) != (manifest.domain, manifest.version):
        raise DatastoreCorrupt(
            f"{path / shard.name} is a part of {found.domain} {found.version}, "
            f"expected a shard of {manifest.domain} {manifest.version}"
        )
    alike = [(name, manifest) for name in ("model", "key_function", "windows", "key_dim", "key_dtype")]
    own = [(name, shard) for name in ("entries", "documents", "tokens", "content")]
    for name, expected in [*alike, *own]:
        if getattr(found, name) != getattr(expected, name):
            raise DatastoreCorrupt(
                f"{path / shard.name} has {name} {getattr(found, name)}, the version says {getattr(expected, name)}"
            )
    return found


@dataclass(frozen=True)
class _Part:
    """Files that were written together: the base, a segment or a shard. sizes: what its file of documents lists."""

    folder: Path
    number: int
    names: SegmentFiles
    sizes: Sizes

    @property
    def documents(self) -> Path:
        return self.folder / self.names.documents


def _parts(path: Path, manifest: Manifest) -> list[_Part]:
    """In the order in which their entries are numbered."""
    if manifest.shards:
        return [
            _Part(path / s.name, number, segment_files(0), Sizes(s.documents, s.tokens, s.entries))
            for number, s in enumerate(manifest.shards)
        ]
    base = Sizes(manifest.base_documents, manifest.base_tokens, manifest.base_entries)
    added = [(s.number, Sizes(s.documents, s.tokens, s.entries)) for s in manifest.segments]
    return [_Part(path, number, segment_files(number), sizes) for number, sizes in [(0, base), *added]]


def _require_sizes(path: Path, manifest: Manifest) -> None:
    for name, record in manifest.files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != record.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise DatastoreCorrupt(f"{file} {found}, expected {record.bytes} bytes")


def _read_tombstones(path: Path, manifest: Manifest) -> Int64:
    """(m,) int64 ascending and distinct: the removed documents of the version in folder `path`, numbered through all
    segments. Raises DatastoreCorrupt when the file is not such an array."""
    if manifest.removed is None:
        return np.empty(0, np.int64)
    file = path / REMOVED
    numbers: Int64 = np.array(open_array(file, (manifest.removed.documents,), "<i8"))
    wrong = numbers[(numbers < 0) | (numbers >= manifest.documents)]
    if len(wrong):
        raise DatastoreCorrupt(f"{file} names document {wrong[0]}, expected [0, {manifest.documents})")
    falls = np.flatnonzero(np.diff(numbers) <= 0)
    if len(falls):
        at = int(falls[0])
        raise DatastoreCorrupt(f"{file} has document {numbers[at + 1]} after {numbers[at]}, expected ascending ones")
    return numbers


def _entry_ranges(path: Path, manifest: Manifest, documents: DocumentTable, removed: Int64) -> tuple[Int64, Int64]:
    """starts and ends, (r,) int64 each: the entries of removed documents as [start, end), ascending, disjoint, none
    empty; neighboring documents make one range. Raises DatastoreCorrupt when the manifest counts others.
    """
    starts, ends = documents.spans(removed)
    found, expected = int((ends - starts).sum()), 0 if manifest.removed is None else manifest.removed.entries
    if found != expected:
        raise DatastoreCorrupt(f"{path / REMOVED} removes {found} entries, expected {expected}")
    some = ends > starts
    starts, ends = starts[some], ends[some]
    begins = np.append(True, starts[1:] != ends[:-1])[: len(starts)]
    return starts[begins], ends[np.append(begins[1:], True)[: len(ends)]]


def _refuse_other_model(path: Path, manifest: Manifest, info: ModelInfo) -> None:
    made_by = {**manifest.model.model_dump(), "key_function": manifest.key_function, "key_dim": manifest.key_dim}
    name = differs(made_by, info)
    if name is not None:
        raise DatastoreMismatch(
            f"{path} was made by model {manifest.model.model_id} with {name} {made_by[name]}, "
            f"model {info.model_id} has {name} {getattr(info, name)}",
            param=name,
        )
