"""Arrays as .npy files: written as a stream or in slices of rows, read as maps. Knows no datastore.

Rows are written with write(), not through a writable map: on a full disk write() fails with an error, while a map kills
the process with SIGBUS.
"""

import hashlib
import io
import math
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from knnlm.datastore.files import CHUNK, disk_errors, sync_file, sync_folder
from knnlm.errors import DatastoreCorrupt

Array = npt.NDArray[Any]  # Any: float16, float32 or int32
Shape = tuple[int, ...]

MAGIC = b"\x93NUMPY\x01\x00"
HEADER = re.compile(
    rb"\{'descr': '([<>][fiu][248])', 'fortran_order': (False|True), 'shape': \(((?:\d{1,18}, )*\d{1,18},?)\), \} *\n"
)


class ArrayStream:
    """Writes a one-dimensional array whose length is known at the end; complete on disk after `close`."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._path = path
        self._dtype = np.dtype(dtype)
        self.length = 0
        with disk_errors(path):
            self._file = path.open("wb")
            self._file.write(_header((0,), self._dtype))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with disk_errors(self._path):  # what could not be written is tried once more
            self._file.close()

    def append(self, part: Array) -> None:
        with disk_errors(self._path):
            self._file.write(np.ascontiguousarray(part, self._dtype).data)
        self.length += len(part)

    def finish(self) -> None:
        with disk_errors(self._path):
            self._file.seek(0)
            self._file.write(_header((self.length,), self._dtype))  # numpy leaves room: every header has one length
            self._file.flush()
            sync_file(self._file.fileno())


class ArrayWriter:
    """Writes rows anywhere into an array of final shape; what was never written reads as zeros."""

    def __init__(self, path: Path, shape: Shape, dtype: npt.DTypeLike) -> None:
        """Continues a file of this shape and dtype, replaces any other."""
        self._path = path
        self._dtype = np.dtype(dtype)
        self._shape = shape
        header = _header(shape, self._dtype)
        self._start = len(header)
        self._row_bytes = self._dtype.itemsize * math.prod(shape[1:])
        size = self._start + shape[0] * self._row_bytes
        with disk_errors(path):
            if not (path.is_file() and path.stat().st_size == size and _begins(path, header)):
                temporary = path.with_name(f".{path.name}.tmp")
                with temporary.open("wb") as file:
                    file.write(header)
                    file.truncate(size)
                    file.flush()
                    sync_file(file.fileno())
                temporary.replace(path)
                sync_folder(path.parent)
            self._file = path.open("r+b", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def write(self, lo: int, rows: Array) -> None:
        """Durably put `rows` at lo, lo + 1, ..."""
        with disk_errors(self._path):
            data = np.ascontiguousarray(rows, self._dtype).data.cast("B")
            at = self._start + lo * self._row_bytes
            while data:  # one call writes at most 2 GiB
                written = os.pwrite(self._file.fileno(), data, at)
                data, at = data[written:], at + written
            sync_file(self._file.fileno())

    def sha256(self, lo: int, hi: int) -> str:
        """Digest of the bytes of rows [lo, hi), as they are on disk."""
        digest = hashlib.sha256()
        at, end = (self._start + row * self._row_bytes for row in (lo, hi))
        while at < end:
            data = os.pread(self._file.fileno(), min(CHUNK, end - at), at)
            digest.update(data)
            at += len(data) or end  # a file cut short has another digest
        return digest.hexdigest()


def open_array(path: Path, shape: Shape, dtype: npt.DTypeLike) -> Array:
    """A read-only map. Raises DatastoreCorrupt, with both, when the file is not an array of this shape and dtype.

    The header must be one of those that numpy writes, and the file end where the array does. numpy itself evaluates
    headers as Python, and takes some that are damaged for other arrays.
    """
    expected = f"expected {np.dtype(dtype).name} of shape {shape}"
    try:
        start, found, ordered, lengths = _read_header(path)
        size = path.stat().st_size
    except (OSError, ValueError) as err:
        raise DatastoreCorrupt(f"{path} cannot be read as an array: {err}; {expected}") from err
    if (lengths, found, ordered) != (shape, np.dtype(dtype), True):
        order = "" if ordered else ", in the order of Fortran"
        raise DatastoreCorrupt(f"{path} holds {found.name} of shape {lengths}{order}, {expected}")
    if size != start + found.itemsize * math.prod(shape):
        raise DatastoreCorrupt(f"{path} has {size} bytes, of which {start} are its header, {expected}")
    try:
        return np.memmap(path, found, "r", start, shape)
    except (OSError, ValueError) as err:
        raise DatastoreCorrupt(f"{path} cannot be mapped: {err}; {expected}") from err


def _read_header(path: Path) -> tuple[int, np.dtype[Any], bool, Shape]:
    """Where the array begins in the file, its dtype, whether it lies row by row, its shape. Raises ValueError."""
    with path.open("rb") as file:
        begin = file.read(len(MAGIC) + 2)
        length = int.from_bytes(begin[len(MAGIC) :], "little")
        text = file.read(length)
    if not begin.startswith(MAGIC) or len(text) != length:
        raise ValueError("it does not begin as a .npy file of version 1.0")
    fields = HEADER.fullmatch(text)
    if fields is None:
        raise ValueError(f"its header is {text[:120]!r}")
    lengths = tuple(int(number) for number in fields[3].replace(b",", b" ").split())
    return len(begin) + length, np.dtype(fields[1].decode()), fields[2] == b"False", lengths


def _header(shape: Shape, dtype: np.dtype[Any]) -> bytes:
    buffer = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def _begins(path: Path, data: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(data)) == data
