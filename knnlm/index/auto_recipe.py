"""The index that suits a datastore, and why: from the number of keys, their dimension and the memory there is."""

from dataclasses import dataclass

from knnlm.index.ivf import RESCORED, lists_for, visited

__all__ = ["Choice", "auto_recipe"]

MIN_TRAINED_ENTRIES = 20_000
DIMENSIONS_PER_CODE = 2  # of four bits: d / 4 bytes per entry
MIN_WIDE_DIM = 128  # dimensions from which on half of them are enough: docs/datastore.md
ID_BYTES = 8
MAX_DIMENSIONS_PER_CODE = 16  # dimensions that one code may stand for, at most


@dataclass(frozen=True)
class Choice:
    """reasons: a sentence each."""

    recipe: str
    reasons: tuple[str, ...]


def auto_recipe(entries: int, dim: int, memory_bytes: int | None = None) -> Choice:
    """A recipe for `entries` keys of `dim` dimensions, in a process that may hold `memory_bytes`; None = enough."""
    if entries < MIN_TRAINED_ENTRIES:
        return Choice("flat", (f"{entries} entries are few: exact search is fast, and nothing has to be trained",))
    lists = lists_for(entries)
    reasons = [f"{entries} entries in {lists} lists: a search visits those with the nearest {visited(entries)} or so"]
    pre_transform = ""
    if dim >= MIN_WIDE_DIM and dim % 2 == 0:
        dim //= 2
        pre_transform = f"pcar{dim},"
        reasons.append(f"candidates are found by the {dim} dimensions of most variance: half the work")
    parts = _parts(dim)
    held = entries * (ID_BYTES + (parts or 0) // 2)
    if parts is None:
        code = "sq8"
        reasons.append(
            f"{dim} dimensions cannot be cut into equal codes of 2 to {MAX_DIMENSIONS_PER_CODE}: a byte each instead"
        )
    elif memory_bytes is not None and held > memory_bytes:
        code = "sq8"
        reasons.append(
            f"4-bit codes would take {held / 1e9:.2g} of {memory_bytes / 1e9:.2g} GB of memory: "
            "a byte per dimension, which stays in the file, instead"
        )
    else:
        code, pre_transform = f"pq{parts}x4fs", f"pcar{dim},"
        reasons.append("turned at random, so that every code stands for as much of the variance as any other")
        reasons.append(
            f"codes of 4 bits for {dim // parts} dimensions each, scanned in registers, {held / 1e9:.2g} GB in memory"
        )
    if code == "sq8":
        reasons.append(
            "distances are those to the stored keys: what codes lose decides only which candidates there are"
        )
    else:
        reasons.append(f"the nearest {RESCORED} are at their distances to the stored keys, farther ones at estimates")
    return Choice(f"{pre_transform}ivf{lists},{code}", tuple(reasons))


def _parts(dim: int) -> int | None:
    """Equal parts that a key can be cut into, an even number, each of at least DIMENSIONS_PER_CODE dimensions."""
    for width in range(DIMENSIONS_PER_CODE, MAX_DIMENSIONS_PER_CODE + 1):
        if dim % width == 0 and dim // width % 2 == 0:
            return dim // width
    return None
