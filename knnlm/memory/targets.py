"""What a memory is trained to say: p_kNN of every entry of a version, read from the folder that making.py wrote."""

from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from knnlm.datastore.arrays import open_array
from knnlm.datastore.layout import Checksums
from knnlm.errors import DatastoreCorrupt, InvalidRequest
from knnlm.memory.manifest import TARGETS, TargetsManifest, load, require_files
from knnlm.neighbors import TokenMasses

ENTRIES, OFFSETS, TOKENS, MASSES, KEPT = "entries.npy", "offsets.npy", "tokens.npy", "masses.npy", "kept.npy"
SHORT_TOKENS = 1 << 16  # vocabularies up to this size are stored in two bytes

Int64 = npt.NDArray[np.int64]


class Targets:
    """A folder of targets, opened; arrays are maps of files."""

    def __init__(self, folder: Path, manifest: TargetsManifest) -> None:
        n = manifest.entries
        vocab_size = manifest.model.vocab_size
        self.folder = folder
        self.manifest = manifest
        self._entries = open_array(folder / ENTRIES, (n,), "<i8")
        self._offsets = open_array(folder / OFFSETS, (n + 1,), "<i8")
        self._tokens = open_array(folder / TOKENS, (manifest.masses,), token_dtype(vocab_size))
        self._masses = open_array(folder / MASSES, (manifest.masses,), "<f2")
        self._kept = open_array(folder / KEPT, (n,), "<f4")

    @classmethod
    def open(cls, folder: Path, *, check: Checksums = "none") -> Self:
        """Raises DatastoreCorrupt for what is no folder of targets, or was changed since it was made."""
        manifest = load(TargetsManifest, folder / TARGETS)
        require_files(manifest, folder, check)
        return cls(folder, manifest)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> Int64:
        """(n,) ascending: the entries that have a row, empty ones included."""
        return self._entries

    def has(self, entry: int) -> bool:
        """Whether an entry has a row."""
        place = int(np.searchsorted(self._entries, entry))
        return place < len(self) and int(self._entries[place]) == entry

    def rows(self, ids: Int64) -> tuple[TokenMasses, npt.NDArray[np.float32]]:
        """Distributions of entries (m,), each summing to one or empty, and the mass (m,) that was kept of them.

        Raises InvalidRequest for an entry without a row, DatastoreCorrupt for rows that are no distributions.
        """
        places = np.minimum(np.searchsorted(self._entries, ids), max(len(self) - 1, 0))
        if len(ids) and (not len(self) or (self._entries[places] != ids).any()):
            wrong = ids[self._entries[places] != ids] if len(self) else ids
            raise InvalidRequest(f"{self.folder} has no target for entry {wrong[0]}", param="targets")
        starts, counts = self._offsets[places], self._offsets[places + 1] - self._offsets[places]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        flat = np.repeat(starts - offsets[:-1], counts) + np.arange(offsets[-1])
        masses = self._masses[flat].astype(np.float64)
        tokens = self._tokens[flat].astype(np.int32)
        if not (masses > 0).all() or (len(tokens) and tokens.max() >= self.manifest.model.vocab_size):
            raise DatastoreCorrupt(f"{self.folder} holds rows that are no distributions over the vocabulary")
        return TokenMasses(offsets, tokens, np.log(masses)).normalized(), self._kept[places]


def token_dtype(vocab_size: int) -> str:
    """Type of the tokens on disk."""
    return "<u2" if vocab_size <= SHORT_TOKENS else "<i4"
