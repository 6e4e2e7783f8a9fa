"""The second phase of a build: tokens to keys.npy and values.npy, in parts that can each be redone.

A part is a run of consecutive windows and of the entries they give, [lo, hi). Its rows are written and synced before
its record is: a record means that its rows are on disk, so a build killed at any moment loses the part it was in.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from knnlm.datastore.document_table import Row
from knnlm.datastore.files import write_atomic
from knnlm.datastore.layout import Record
from knnlm.datastore.manifest import WindowsRecord
from knnlm.decoding import Window, plan_fed_windows
from knnlm.errors import DatastoreError
from knnlm.messages import ForwardRequest
from knnlm.protocols import LanguageModel

FLOAT16_MAX = 65504.0

Keys = npt.NDArray[np.floating]


class RowWriter(Protocol):
    """Where rows of a part are made durable, as arrays.ArrayWriter does."""

    def write(self, lo: int, rows: npt.NDArray[Any]) -> None: ...
    def sha256(self, lo: int, hi: int) -> str: ...


class TokenReader(Protocol):
    """The tokens of all documents, one after another: a document's are [start : start + tokens]."""

    def __getitem__(self, part: slice, /) -> npt.NDArray[np.int32]: ...


@dataclass(frozen=True)
class Piece:
    """One window of one document, and the number of its first entry."""

    document: Row
    window: Window
    entry: int

    @property
    def entries(self) -> int:
        return self.window.end - self.window.first


@dataclass(frozen=True)
class Part:
    """Consecutive pieces and their entries [lo, hi)."""

    number: int
    lo: int
    hi: int
    pieces: tuple[Piece, ...]


class PartRecord(Record):
    """parts/NNNNN.json: these rows are on disk."""

    lo: int
    hi: int
    keys_sha256: str
    values_sha256: str


def plan_parts(
    rows: Iterable[Row], windows: WindowsRecord, part_entries: int, bos_token_id: int | None = None
) -> Iterator[Part]:
    """Cut the documents into parts of at least `part_entries` entries, the last excepted; always the same way."""
    bos = bos_token_id if windows.bos == "window" else None
    number = lo = entry = 0
    pieces: list[Piece] = []
    for row in rows:
        for window in plan_fed_windows(row.tokens, windows.context_length, windows.min_context, bos):
            pieces.append(Piece(row, window, entry))
            entry += pieces[-1].entries
            if entry - lo >= part_entries:
                yield Part(number, lo, entry, tuple(pieces))
                number, lo, pieces = number + 1, entry, []
    if pieces:
        yield Part(number, lo, entry, tuple(pieces))


class Encoder:
    """Makes parts durable: each call of `finish` leaves one more of them on disk."""

    def __init__(
        self, lm: LanguageModel, tokens: TokenReader, keys: RowWriter, values: RowWriter, *,
        key_dtype: str, batch_tokens: int, records: Path,
    ) -> None:  # fmt: skip
        self._lm = lm
        self._tokens = tokens
        self._keys = keys
        self._values = values
        self._key_dtype = np.dtype(key_dtype)
        self._batch_tokens = batch_tokens
        self._records = records

    def finished(self, part: Part) -> bool:
        """Whether an earlier run left this part on disk, undamaged. Costs one reading of its rows."""
        try:
            record = PartRecord.model_validate_json(self._record(part).read_bytes())
        except (FileNotFoundError, ValidationError):
            return False
        return record == PartRecord(
            lo=part.lo,
            hi=part.hi,
            keys_sha256=self._keys.sha256(part.lo, part.hi),
            values_sha256=self._values.sha256(part.lo, part.hi),
        )

    def finish(self, part: Part, on_tokens: Callable[[int], None]) -> None:
        """Run the part's windows through the model and write their entries; `on_tokens` hears of every batch fed.

        Raises DatastoreError, naming document and position, for a key that is not finite or does not fit the dtype.
        """
        keys = np.empty((part.hi - part.lo, self._lm.info.key_dim), self._key_dtype)  # (e, d)
        values = np.empty(part.hi - part.lo, "<i4")  # (e,)
        for batch in _batches(part.pieces, self._batch_tokens):
            made = self._forward(batch)  # (sum of entries, d)
            at = 0
            for piece in batch:
                rows = slice(piece.entry - part.lo, piece.entry - part.lo + piece.entries)
                keys[rows] = self._checked(made[at : at + piece.entries], piece)
                values[rows] = self._document(piece)[piece.window.first : piece.window.end]
                at += piece.entries
            on_tokens(sum(len(piece.window) for piece in batch))
        self._keys.write(part.lo, keys)
        self._values.write(part.lo, values)
        record = PartRecord(lo=part.lo, hi=part.hi, keys_sha256=_sha256(keys), values_sha256=_sha256(values))
        write_atomic(self._record(part), record.model_dump_json().encode())

    def _forward(self, batch: list[Piece]) -> Keys:
        request = ForwardRequest(
            tokens=[piece.window.fed(self._document(piece)) for piece in batch],
            positions=[piece.window.positions for piece in batch],
            keys=True,
        )
        keys = self._lm.forward(request).keys
        shape = (sum(piece.entries for piece in batch), self._lm.info.key_dim)
        if keys is None or keys.shape != shape:
            raise DatastoreError(f"the model gave keys {None if keys is None else keys.shape}, expected {shape}")
        return keys

    def _document(self, piece: Piece) -> npt.NDArray[np.int32]:
        return self._tokens[piece.document.start : piece.document.start + piece.document.tokens]

    def _checked(self, keys: Keys, piece: Piece) -> Keys:
        limit = FLOAT16_MAX if self._key_dtype == np.float16 else float(np.finfo(np.float32).max)
        largest = np.abs(keys.astype(np.float32)).max(axis=1)  # (e,) NaN where a number is
        good = largest <= limit
        if not good.all():
            row = int(np.argmin(good))
            raise DatastoreError(
                f"the key at position {piece.window.first - 1 + row} of document {piece.document.id!r} has a number "
                f"that {self._key_dtype.name} cannot hold: largest is {largest[row]}, at most {limit:g} fits"
            )
        return keys

    def _record(self, part: Part) -> Path:
        return record_path(self._records, part.number)


def record_path(records: Path, number: int) -> Path:
    """The file of a part's PartRecord."""
    return records / f"{number:05d}.json"


def _batches(pieces: Iterable[Piece], batch_tokens: int) -> Iterator[list[Piece]]:
    """Windows of similar length together, so that little is padding: rows times the longest <= batch_tokens."""
    batch: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: -len(p.window)):  # longest first
        if batch and (len(batch) + 1) * len(batch[0].window) > batch_tokens:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def _sha256(rows: npt.NDArray[Any]) -> str:  # Any: float16, float32 or int32
    return hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest()
