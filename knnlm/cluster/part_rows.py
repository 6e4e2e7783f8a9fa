"""Keys or values of one part of a build: an array in a file of the build or in an object elsewhere."""

import hashlib
import secrets
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from knnlm.cluster.objects import read_object, write_object
from knnlm.datastore.arrays import ArrayWriter, open_array
from knnlm.datastore.files import disk_errors, sync_folder
from knnlm.errors import DatastoreCorrupt


class PartRows(ABC):
    """An array of the rows of one part, in a file or an object of its own. lo: the number of the first row."""

    def __init__(self, lo: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self._lo = lo
        self._shape = shape
        self._dtype = np.dtype(dtype)

    @abstractmethod
    def write(self, lo: int, rows: npt.NDArray[Any]) -> None:  # Any: float16, float32 or int32
        """Write all rows. lo: the number of the first, as other writers of rows take it."""

    @abstractmethod
    def read(self) -> npt.NDArray[Any]:
        """The rows. Raises DatastoreCorrupt where they are missing or of another size."""

    def sha256(self, lo: int, hi: int) -> str:
        """Digest of rows [lo, hi); empty where they are missing or of another size."""
        try:
            rows = self.read()
        except DatastoreCorrupt:
            return ""
        return hashlib.sha256(rows[lo - self._lo : hi - self._lo].data).hexdigest()


class FileRows(PartRows):
    def __init__(self, path: Path, lo: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        super().__init__(lo, shape, dtype)
        self._path = path

    def write(self, lo: int, rows: npt.NDArray[Any]) -> None:
        del lo
        draft = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
        with ArrayWriter(draft, self._shape, self._dtype) as writer:
            writer.write(0, rows)
        with disk_errors(self._path):
            draft.replace(self._path)
            sync_folder(self._path.parent)

    def read(self) -> npt.NDArray[Any]:
        return open_array(self._path, self._shape, self._dtype)


class ObjectRows(PartRows):
    def __init__(self, url: str, lo: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        super().__init__(lo, shape, dtype)
        self._url = url

    def write(self, lo: int, rows: npt.NDArray[Any]) -> None:
        del lo
        write_object(self._url, rows.astype(self._dtype, copy=False))

    def read(self) -> npt.NDArray[Any]:
        return read_object(self._url, self._shape, self._dtype)
