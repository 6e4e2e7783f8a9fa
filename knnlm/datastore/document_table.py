"""documents.jsonl: which documents a datastore was made of, and which entry belongs to which of them.

Line i is document i: {"id", "start", "tokens"}, start being its first token's place in tokens.npy. A document of t
tokens gives t - 1 entries (none when t < 2), in order; so the table alone says where every entry came from. A segment
that was added has such a file of its own, whose documents, tokens and entries are numbered on.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from knnlm.errors import DatastoreCorrupt

Int64 = npt.NDArray[np.int64]
MAX_TOKENS = 1 << 48  # sums of them fit int64


@dataclass(frozen=True)
class Row:
    """One document: tokens.npy[start : start + tokens]."""

    id: str
    start: int
    tokens: int

    @property
    def entries(self) -> int:
        return max(self.tokens - 1, 0)

    def line(self) -> bytes:
        return (json.dumps({"id": self.id, "start": self.start, "tokens": self.tokens}) + "\n").encode()


@dataclass(frozen=True)
class Sizes:
    """What one file of documents lists, in numbers."""

    documents: int
    tokens: int
    entries: int

    def __str__(self) -> str:
        return f"{self.documents} documents, {self.tokens} tokens and {self.entries} entries"


def read_rows(path: Path) -> Iterator[Row]:
    """The documents in order. Raises DatastoreCorrupt that names the line where they do not follow one another."""
    start = 0
    for row, _ in rows_with_offsets(path):
        _refuse_gap(path, row.id, row.start, start)
        start += row.tokens
        yield row


class DocumentTable:
    """56 bytes of memory per document; the ids stay on disk, their hashes do not.

    starts: (m,) int64, of a document's tokens; lengths: (m,), how many tokens; first_entries: (m,); all numbered
    through all files. sizes: of every file.
    """

    def __init__(self, *paths: Path, removed: Int64 | None = None) -> None:
        """paths: the files, the base's first. removed: ascending numbers of documents that no id leads to.

        Reads the files once. Raises DatastoreCorrupt when one is malformed, or documents do not follow one another.
        """
        self._paths = paths
        self._removed = np.empty(0, np.int64) if removed is None else removed
        parts = [_table(path) for path in paths]
        table: Int64 = np.concatenate([np.empty((0, 5), np.int64), *parts])  # (m, 5)
        self.sizes = tuple(Sizes(len(p), int(p[:, 1].sum()), int(p[:, 2].sum())) for p in parts)
        self._first = np.cumsum([0, *(len(p) for p in parts)])  # document of every file, and how many there are
        self.lengths: Int64 = table[:, 1].copy()
        self.starts: Int64 = np.cumsum(self.lengths) - self.lengths
        self.first_entries: Int64 = np.cumsum(table[:, 2]) - table[:, 2]
        self._offsets: Int64 = table[:, 3].copy()  # (m,) of lines, in bytes
        self._by_hash: Int64 = np.argsort(table[:, 4], kind="stable")  # (m,) documents
        self._hashes: Int64 = table[self._by_hash, 4]  # (m,) ascending

    def __len__(self) -> int:
        return len(self.starts)

    def locate(self, entries: npt.NDArray[np.integer]) -> tuple[Int64, Int64]:
        """(document, position of the value within it) per entry; the caller has checked that the entries exist."""
        # side="right": of several documents that begin at one entry, all but the last have no entries
        documents = np.searchsorted(self.first_entries, entries, side="right") - 1
        return documents.astype(np.int64), entries - self.first_entries[documents] + 1

    def spans(self, documents: Int64) -> tuple[Int64, Int64]:
        """First entry of each of these documents, and the one after its last; equal for one without entries."""
        first = self.first_entries[documents]
        return first, first + np.maximum(self.lengths[documents] - 1, 0)

    def numbers(self, name: str) -> Int64:
        """The documents with this id, ascending, without removed ones: none, one, or several, since nothing forbids
        that."""
        wanted = np.int64(_hash(name))
        alike = self._by_hash[np.searchsorted(self._hashes, wanted) : np.searchsorted(self._hashes, wanted, "right")]
        live = alike[~np.isin(alike, self._removed)] if len(self._removed) and len(alike) else alike
        return np.array([number for number in live if self.id(int(number)) == name], np.int64)

    def id(self, document: int) -> str:
        """The id of a document. Raises DatastoreCorrupt where its line cannot be read any more."""
        part = self.part(document)
        with _opened(self._paths[part]) as file:
            file.seek(int(self._offsets[document]))
            return _row(file.readline(), self._paths[part], document - int(self._first[part]) + 1).id

    def part(self, document: int) -> int:
        """Which of the files tells of a document: 0 is the first."""
        return int(np.searchsorted(self._first, document, side="right")) - 1


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file, for reading. Raises DatastoreCorrupt where it is gone or cannot be read."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as err:
        raise DatastoreCorrupt(f"{path} cannot be read: {err.strerror or err}") from err


def _table(path: Path) -> Int64:
    """(m, 5): start, tokens, entries, place of the line, hash of the id."""
    columns = ((row.start, row.tokens, row.entries, offset, _hash(row.id)) for row, offset in rows_with_offsets(path))
    table: Int64 = np.fromiter(columns, np.dtype((np.int64, 5)))
    expected = np.cumsum(table[:, 1]) - table[:, 1]
    wrong = np.flatnonzero(table[:, 0] != expected)
    if len(wrong):
        at = int(wrong[0])
        with _opened(path) as file:
            file.seek(int(table[at, 3]))
            _refuse_gap(path, _row(file.readline(), path, at + 1).id, int(table[at, 0]), int(expected[at]))
    return table


def _refuse_gap(path: Path, name: str, start: int, expected: int) -> None:
    if start != expected:
        raise DatastoreCorrupt(f"{path}: document {name!r} starts at token {start}, expected {expected}")


def _hash(name: str) -> int:
    """64 signed bits. surrogatepass: an id may hold what is no character."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def rows_with_offsets(path: Path, offset: int = 0) -> Iterator[tuple[Row, int]]:
    """The documents and where their lines begin, in bytes; from the line at `offset` on. Raises DatastoreCorrupt."""
    with _opened(path) as lines:
        lines.seek(offset)
        for number, line in enumerate(lines, start=1):
            yield _row(line, path, number), offset
            offset += len(line)


def _row(line: bytes, path: Path, number: int) -> Row:
    try:
        fields = json.loads(line)
        name, start, tokens = fields["id"], fields["start"], fields["tokens"]
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise DatastoreCorrupt(f"{path}, line {number} is not a document: {err}") from err
    if not (isinstance(name, str) and _is_number(start) and _is_number(tokens)):
        raise DatastoreCorrupt(
            f"{path}, line {number}: expected a string and two integers in [0, {MAX_TOKENS}), got {line[:80]!r}"
        )
    return Row(name, start, tokens)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_TOKENS
