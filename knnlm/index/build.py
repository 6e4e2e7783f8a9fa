"""Giving a published version an index: the file first, then the manifest that names it, then what it replaced goes.

Killed at any moment the version is what it was, or has the new index; indexing that was stopped starts over.
Processes that have a former one open keep it.
"""

from collections.abc import Callable
from pathlib import Path

from knnlm.datastore.files import disk_errors, locked, sha256_of, sync_file, sync_folder
from knnlm.datastore.layout import FileRecord
from knnlm.datastore.manifest import IndexRecord, Manifest
from knnlm.datastore.reader import Datastore
from knnlm.datastore.updates.revise import with_index, without_index
from knnlm.errors import InvalidRequest
from knnlm.index.auto_recipe import Choice, auto_recipe
from knnlm.index.table import family

__all__ = ["build_index", "index_remark", "remove_index", "suited"]

Report = Callable[[int, int], None]


def suited(path: Path, recipe: str = "auto", *, memory_bytes: int | None = None) -> Choice:
    """What `build_index` would build in the version in folder `path`, and why.

    "auto" is chosen from the number of entries, their dimension and memory_bytes, which a process may hold. A recipe
    that asks for more entries than there are gives way to a smaller one. Raises InvalidRequest for one that is not
    known, or that does not suit for another reason.
    """
    manifest = Manifest.load(path)
    entries, dim = manifest.base_entries, manifest.key_dim
    if recipe == "auto":
        return auto_recipe(entries, dim, memory_bytes)
    chosen = family(recipe)
    why_not = chosen.why_unsuitable(entries, dim)
    if why_not is None:
        return Choice(recipe, ("as asked",))
    smaller = chosen.fallback_recipe(entries, dim)
    if smaller is None or family(smaller).why_unsuitable(entries, dim) is not None:
        raise InvalidRequest(f"index {recipe} does not suit {path}: {why_not}", param="recipe")
    return Choice(smaller, (f"{recipe} was asked for, but {why_not}",))


def build_index(
    path: Path, recipe: str = "auto", *, seed: int = 0, beside: bool = False, on_progress: Report | None = None
) -> str:
    """Index the version in folder `path` and return the recipe, which is what `suited` says.

    Indexed is what the version was built from; entries that were added to it since are searched exactly beside any
    index, until it is compacted. The index becomes the default of the version, in place of the former; with beside=True
    both are kept, the former the default. on_progress hears (keys added, keys in all). Raises InvalidRequest as
    `suited` does, Conflict when another process is indexing it, DatastoreError when it cannot be read or written.
    """
    datastore = Datastore.open(path)
    recipe = suited(path, recipe).recipe
    chosen = family(recipe)
    with locked(path / "keys.npy", wait=False, doing="indexing"):
        for leftover in path.glob(".index.*"):
            leftover.unlink()
        building = path / ".index.building"
        try:
            parameters = chosen.build(datastore.keys, building, seed, on_progress or _silent)
            files = _named(building) if chosen.has_file else {}
            index = IndexRecord(recipe=recipe, file=next(iter(files), None), parameters=dict(parameters))
            with_index(path, index, files, beside=beside)
        finally:
            building.unlink(missing_ok=True)
            _remove_unnamed(path)
    return recipe


def index_remark(path: Path, recipe: str) -> str | None:
    """A sentence about what is unusual in this index of the version in folder `path`; None mostly."""
    file = Manifest.load(path).index_of(recipe).file
    return None if file is None else family(recipe).remark(path / file)


def remove_index(path: Path, recipe: str) -> None:
    """Take an index from the version in folder `path`. Raises as `without_index` and `build_index` do."""
    with locked(path / "keys.npy", wait=False, doing="indexing"):
        without_index(path, recipe)
        _remove_unnamed(path)


def _remove_unnamed(path: Path) -> None:
    manifest = Manifest.load(path)
    for former in path.glob("index.*.faiss"):
        if former.name not in manifest.files:
            former.unlink()


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
