"""removed.npy: which documents of a version do not count any more, and which entries that takes away."""

from pathlib import Path

import numpy as np

from knnlm.datastore.arrays import open_array
from knnlm.datastore.documents import DocumentTable, Int64
from knnlm.datastore.layout import REMOVED
from knnlm.datastore.manifest import Manifest
from knnlm.errors import DatastoreCorrupt

__all__ = ["entry_ranges", "read_removed"]


def read_removed(path: Path, manifest: Manifest) -> Int64:
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


def entry_ranges(path: Path, manifest: Manifest, documents: DocumentTable, removed: Int64) -> tuple[Int64, Int64]:
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
