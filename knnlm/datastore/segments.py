"""The arrays of one segment, opened: of the base, which a version was built from, or of what was added to it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from knnlm.datastore.arrays import open_array
from knnlm.datastore.layout import segment_files
from knnlm.datastore.manifest import Manifest

__all__ = ["Int32", "Keys", "Segment", "open_segments", "segment_numbers"]

Keys = npt.NDArray[np.floating]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Segment:
    """keys: (n, d) float16 or float32. values: (n,) int32. tokens: (t,) int32. All read-only maps, numbered from 0."""

    number: int
    keys: Keys
    values: Int32
    tokens: Int32


def segment_numbers(manifest: Manifest) -> tuple[int, ...]:
    """0 for the base, then those that were added, in the order in which their entries are numbered."""
    return (0, *(segment.number for segment in manifest.segments))


def open_segments(path: Path, manifest: Manifest) -> Iterator[Segment]:
    """The base and all segments of the version in folder `path`. Raises DatastoreCorrupt as `open_array` does."""
    sizes = [(manifest.base_entries, manifest.base_tokens), *((s.entries, s.tokens) for s in manifest.segments)]
    key_dtype = np.dtype(manifest.key_dtype).newbyteorder("<")
    for number, (entries, tokens) in zip(segment_numbers(manifest), sizes, strict=True):
        names = segment_files(number)
        yield Segment(
            number,
            open_array(path / names.keys, (entries, manifest.key_dim), key_dtype),
            open_array(path / names.values, (entries,), "<i4"),
            open_array(path / names.tokens, (tokens,), "<i4"),
        )
