"""Giving a published version an index: the file first, then the manifest that names it, then what it replaced goes.

Killed at any moment the version is what it was, or has the new index; indexing that was stopped starts over.
Processes that have a former one open keep it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from knnlm.datastore.files import locked
from knnlm.datastore.layout import KEYS, shard_name
from knnlm.datastore.manifest import IndexRecord, Manifest
from knnlm.datastore.reader import Datastore
from knnlm.datastore.shards import shard_folders
from knnlm.datastore.updates.revise import with_index, without_index
from knnlm.errors import InvalidRequest
from knnlm.index.auto_recipe import Choice, auto_recipe
from knnlm.index.files import named, remove_unnamed
from knnlm.index.sharded_build import build_sharded_index, remove_sharded_index
from knnlm.index.table import family

__all__ = ["build_index", "index_remark", "remove_index", "suited", "suiting"]

Report = Callable[[int, int], None]


def suited(path: Path, recipe: str = "auto", *, memory_bytes: int | None = None) -> Choice:
    """What `build_index` would build in the version in folder `path`, and why.

    "auto" is chosen from the number of entries, their dimension and memory_bytes, which a process may hold. A recipe
    that asks for more entries than there are gives way to a smaller one. Raises InvalidRequest for one that is not
    known, or that does not suit for another reason.
    """
    manifest = Manifest.load(path)
    return suiting(manifest.base_entries, manifest.key_dim, recipe, str(path), memory_bytes=memory_bytes)


def suiting(entries: int, dim: int, recipe: str, what: str, *, memory_bytes: int | None = None) -> Choice:
    """`suited` of `what`, which has these entries and dimensions."""
    if recipe == "auto":
        return auto_recipe(entries, dim, memory_bytes)
    chosen = family(recipe)
    why_not = chosen.why_unsuitable(entries, dim)
    if why_not is None:
        return Choice(recipe, ("as asked",))
    smaller = chosen.fallback_recipe(entries, dim)
    if smaller is None or family(smaller).why_unsuitable(entries, dim) is not None:
        raise InvalidRequest(f"index {recipe} does not suit {what}: {why_not}", param="recipe")
    return Choice(smaller, (f"{recipe} was asked for, but {why_not}",))


def build_index(
    path: Path, recipe: str = "auto", *, seed: int = 0, beside: bool = False, on_progress: Report | None = None
) -> str:
    """Index the version in folder `path` and return the recipe, which is what `suited` says.

    Indexed is what the version was built from; entries that were added to it since are searched exactly beside any
    index, until it is compacted. Of a version of shards, each gets its part of one index. The index becomes the default
    of the version, in place of the former; with beside=True both are kept, the former the default. on_progress hears
    (keys added, keys in all). Raises InvalidRequest as `suited` does, Conflict when another process is indexing it,
    DatastoreError when it cannot be read or written.
    """
    datastore = Datastore.open(path)
    recipe = suited(path, recipe).recipe
    chosen = family(recipe)
    with _indexing(path):
        if datastore.manifest.shards:
            build_sharded_index(path, recipe, seed=seed, beside=beside, on_progress=on_progress)
            remove_unnamed(path)
            return recipe
        for leftover in path.glob(".index.*"):
            leftover.unlink()
        building = path / ".index.building"
        try:
            parameters = chosen.build(datastore.keys, building, seed, on_progress or _silent)
            files = named(building) if chosen.has_file else {}
            index = IndexRecord(recipe=recipe, file=next(iter(files), None), parameters=dict(parameters))
            with_index(path, index, files, beside=beside)
        finally:
            building.unlink(missing_ok=True)
            remove_unnamed(path)
    return recipe


def index_remark(path: Path, recipe: str) -> str | None:
    """A sentence about what is unusual in this index of the version in folder `path`, or in a shard's part of it; None
    mostly."""
    manifest = Manifest.load(path)
    folders = list(shard_folders(path, manifest)) or [path]
    files = [(folder, Manifest.load(folder).index_of(recipe).file) for folder in folders]
    remarks = (None if file is None else family(recipe).remark(folder / file) for folder, file in files)
    return next((remark for remark in remarks if remark is not None), None)


def remove_index(path: Path, recipe: str) -> None:
    """Take an index from the version in folder `path`. Raises as `without_index` and `build_index` do."""
    with _indexing(path):
        if Manifest.load(path).shards:
            remove_sharded_index(path, recipe)
        else:
            without_index(path, recipe)
        remove_unnamed(path)


@contextmanager
def _indexing(path: Path) -> Iterator[None]:
    """The lock of whoever indexes a version: on its keys, or on those of its first shard."""
    first = path / shard_name(0)
    with locked((first if first.is_dir() else path) / KEYS, wait=False, doing="indexing"):
        yield


def _silent(done: int, total: int) -> None:
    del done, total
