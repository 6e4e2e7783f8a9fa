"""The index that suits a datastore, and why: from the number of keys, their dimension and the memory there is."""

from dataclasses import dataclass

from knnlm.index.ivf import lists_for, visited

__all__ = ["Choice", "choose"]

FLAT_ENTRIES = 20_000
DIMENSIONS_PER_CODE = 2  # of four bits: d / 4 bytes per entry
COARSEST = 16  # dimensions that one code may stand for, at most


@dataclass(frozen=True)
class Choice:
    """reasons: a sentence each."""

    recipe: str
    reasons: tuple[str, ...]


def choose(entries: int, dim: int, memory_bytes: int | None = None) -> Choice:
    """A recipe for so many keys of this dimension, for a process that may hold `memory_bytes`; None = enough."""
    if entries < FLAT_ENTRIES:
        return Choice("flat", (f"{entries} entries are few: exact search is fast, and nothing has to be trained",))
    lists = lists_for(entries)
    why_lists = f"{entries} entries in {lists} lists: a search visits those with the nearest {visited(entries)} or so"
    last = "distances are rescored from the stored keys, so what codes lose decides only which candidates there are"
    parts = _parts(dim)
    if parts is None:
        why = f"{dim} dimensions cannot be cut into equal codes of 2 to {COARSEST}: a byte per dimension instead"
        return Choice(f"ivf{lists},sq8", (why_lists, why, last))
    held = entries * (parts // 2 + 8)  # codes and ids
    why = f"codes of 4 bits for {dim // parts} dimensions each, scanned in registers"
    if memory_bytes is not None and held > memory_bytes:
        why = (
            f"4-bit codes would take {held / 1e9:.2g} of {memory_bytes / 1e9:.2g} GB of memory: "
            "a byte per dimension, which stays in the file, instead"
        )
        return Choice(f"ivf{lists},sq8", (why_lists, why, last))
    return Choice(f"ivf{lists},pq{parts}x4fs", (why_lists, f"{why}, {held / 1e9:.2g} GB in memory", last))


def _parts(dim: int) -> int | None:
    """Into how many equal parts a key can be cut, an even number, each of at least DIMENSIONS_PER_CODE dimensions."""
    for width in range(DIMENSIONS_PER_CODE, COARSEST + 1):
        if dim % width == 0 and dim // width % 2 == 0:
            return dim // width
    return None
