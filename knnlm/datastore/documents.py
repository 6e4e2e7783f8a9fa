"""documents.jsonl: which documents a datastore was made of, and which entry belongs to which of them.

Line i is document i: {"id", "start", "tokens"}, start being its first token's place in tokens.npy. A document of t
tokens gives t - 1 entries (none when t < 2), in order; so the table alone says where every entry came from.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from knnlm.errors import DatastoreCorrupt

__all__ = ["DocumentTable", "Row", "read_rows"]

Int64 = npt.NDArray[np.int64]


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


def read_rows(path: Path) -> Iterator[Row]:
    """The documents in order. Raises DatastoreCorrupt that names the line where they do not follow one another."""
    start = 0
    for row, _ in _rows_with_offsets(path):
        if row.start != start or row.tokens < 0:
            raise DatastoreCorrupt(f"{path}: document {row.id!r} starts at token {row.start}, expected {start}")
        start += row.tokens
        yield row


class DocumentTable:
    """48 bytes of memory per document; the ids stay on disk, their hashes do not."""

    def __init__(self, path: Path) -> None:
        """Reads the whole file once. Raises DatastoreCorrupt when it is malformed."""
        self._path = path
        columns = (
            (row.start, row.tokens, row.entries, offset, _hash(row.id)) for row, offset in _rows_with_offsets(path)
        )
        table: Int64 = np.fromiter(columns, np.dtype((np.int64, 5)))  # (m, 5)
        self.starts: Int64 = table[:, 0].copy()  # (m,) of tokens
        self.lengths: Int64 = table[:, 1].copy()  # (m,) in tokens
        self.first_entries: Int64 = np.cumsum(table[:, 2]) - table[:, 2]  # (m,)
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

    def numbers(self, name: str) -> Int64:
        """The documents with this id, ascending: none, one, or several, since nothing forbids that."""
        wanted = np.int64(_hash(name))
        alike = self._by_hash[np.searchsorted(self._hashes, wanted) : np.searchsorted(self._hashes, wanted, "right")]
        return np.array([number for number in alike if self.id(int(number)) == name], np.int64)

    def id(self, document: int) -> str:
        with self._path.open("rb") as file:
            file.seek(int(self._offsets[document]))
            return _row(file.readline(), self._path, document + 1).id


def _hash(name: str) -> int:
    """Of 64 bits, signed. surrogatepass: an id may hold what is no character."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _rows_with_offsets(path: Path) -> Iterator[tuple[Row, int]]:
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            yield _row(line, path, number), offset
            offset += len(line)


def _row(line: bytes, path: Path, number: int) -> Row:
    try:
        fields = json.loads(line)
        name, start, tokens = fields["id"], fields["start"], fields["tokens"]
    except (ValueError, KeyError, TypeError) as err:
        raise DatastoreCorrupt(f"{path}, line {number} is not a document: {err}") from err
    if not (isinstance(name, str) and isinstance(start, int) and isinstance(tokens, int)):
        raise DatastoreCorrupt(f"{path}, line {number}: expected a string and two integers, got {line[:80]!r}")
    return Row(name, start, tokens)
