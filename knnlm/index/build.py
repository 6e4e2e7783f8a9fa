"""Giving a published version an index: the file first, then the manifest that names it, then the former file goes.

Killed at any moment the version is what it was, or has the new index. Processes that have the former one open keep it.
"""

import math
from collections.abc import Callable
from pathlib import Path

from knnlm.datastore.files import disk_errors, locked, sha256_of, sync_file, sync_folder
from knnlm.datastore.manifest import FileRecord, IndexRecord, with_index
from knnlm.datastore.reader import Datastore
from knnlm.errors import InvalidRequest
from knnlm.index.table import family

__all__ = ["build_index", "choose"]

FLAT_ENTRIES = 50_000
ENTRIES_PER_LIST = 40  # FAISS warns below 39 training points per list
MAX_LISTS = 1 << 16

Report = Callable[[int, int], None]


def build_index(path: Path, recipe: str = "auto", *, seed: int = 0, on_progress: Report | None = None) -> str:
    """Index the version in folder `path` and return the recipe; "auto" takes what `choose` says.

    on_progress hears (keys added, keys in all). Raises InvalidRequest for a recipe that is not known or does not suit
    the datastore, Conflict when another process is indexing it, DatastoreError when it cannot be read or written.
    """
    datastore = Datastore.open(path)
    entries, dim = datastore.keys.shape
    if recipe == "auto":
        recipe, _ = choose(entries, dim)
    chosen = family(recipe)
    why_not = chosen.refusal(entries, dim)
    if why_not is not None:
        raise InvalidRequest(f"index {recipe} does not suit {path}: {why_not}", param="recipe")
    with locked(path / "keys.npy", wait=False, doing="indexing"):
        for leftover in path.glob(".index.*"):
            leftover.unlink()
        building = path / ".index.building"
        parameters = chosen.build(datastore.keys, building, seed, on_progress or _silent)
        files = _named(building) if chosen.has_file else {}
        index = IndexRecord(recipe=recipe, file=next(iter(files), None), parameters=dict(parameters))
        manifest = with_index(path, index, files)
        for former in path.glob("index.*.faiss"):
            if former.name not in manifest.files:
                former.unlink()
    return recipe


def choose(entries: int, dim: int) -> tuple[str, str]:
    """A recipe for so many keys of this dimension, and the reason in a sentence."""
    if entries < FLAT_ENTRIES:
        return "flat", f"{entries} entries are few: exact search is fast enough, and nothing has to be trained"
    lists = min(round(4 * math.sqrt(entries)), entries // ENTRIES_PER_LIST, MAX_LISTS)
    return f"ivf{lists},sq8", (
        f"{entries} entries: about 4 sqrt(n) = {lists} lists of {entries // lists} entries on average, "
        f"a byte per dimension ({entries * dim / 1e9:.2g} GB), distances rescored from the stored keys"
    )


def _named(building: Path) -> dict[str, FileRecord]:
    """Make the file durable under a name that says what is in it, so that no name ever means two contents."""
    sha256 = sha256_of(building)
    name = f"index.{sha256[:16]}.faiss"
    with disk_errors(building):
        with building.open("rb") as file:
            sync_file(file.fileno())
        record = FileRecord(bytes=building.stat().st_size, sha256=sha256)
        building.rename(building.with_name(name))
        sync_folder(building.parent)
    return {name: record}


def _silent(done: int, total: int) -> None:
    del done, total
