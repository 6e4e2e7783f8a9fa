"""What may change in a published version: how it was tuned, and its indexes. Everything else stays as it was written.

Each change replaces the manifest as a whole, one at a time over all processes.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from knnlm.datastore.files import locked
from knnlm.datastore.layout import FileRecord
from knnlm.datastore.manifest import IndexRecord, Manifest
from knnlm.datastore.tuning import TuningRecord
from knnlm.errors import Conflict, InvalidRequest
from knnlm.tuning_records import Tuning


def with_tuning(path: Path, tuning: Tuning) -> Manifest:
    """Store what was fitted for the version in folder `path`. Raises InvalidRequest for numbers out of range."""
    record = TuningRecord.of(tuning)
    return _rewrite(path, lambda old: old.model_copy(update={"tuning": record}))


def with_index(path: Path, index: IndexRecord, files: Mapping[str, FileRecord], *, beside: bool = False) -> Manifest:
    """Make `index`, whose `files` lie in folder `path` already, the default index of the version.

    It takes the place of one of the same recipe, and of the former default; with `beside` the former default stays and
    the new one is added to the others.
    """

    def change(old: Manifest) -> Manifest:
        others = [other for other in old.other_indexes if other.recipe != index.recipe]
        if not beside or old.index.recipe == index.recipe:
            return _indexed(old, [index, *others], files)
        return _indexed(old, [old.index, *others, index], files)

    return _rewrite(path, change)


def with_default_index(path: Path, recipe: str) -> Manifest:
    """Make an index that the version has its default, of its shards as well. Raises InvalidRequest for another
    recipe."""

    def change(old: Manifest) -> Manifest:
        chosen = old.index_of(recipe)
        return _indexed(old, [chosen, *(index for index in old.indexes if index.recipe != recipe)], {})

    changed = _rewrite(path, change)
    for shard in changed.shards:
        _rewrite(path / shard.name, change)
    return changed


def without_index(path: Path, recipe: str) -> Manifest:
    """Take an index from the version. Raises InvalidRequest for one it does not have, Conflict for its default."""

    def change(old: Manifest) -> Manifest:
        if recipe == old.index.recipe:
            raise Conflict(f"{recipe} is the default index of {path}: make another one the default first")
        if recipe not in {index.recipe for index in old.indexes}:
            raise InvalidRequest(f"{path} has no index {recipe!r} to remove: it has {_names(old)}", param="index")
        return _indexed(old, [index for index in old.indexes if index.recipe != recipe], {})

    return _rewrite(path, change)


def _indexed(old: Manifest, indexes: Sequence[IndexRecord], files: Mapping[str, FileRecord]) -> Manifest:
    """The manifest with these indexes, the default first, and without files that no index names any more."""
    gone = {index.file for index in old.indexes} - {index.file for index in indexes}
    kept = {name: record for name, record in old.files.items() if name not in gone}
    update = {"index": indexes[0], "other_indexes": tuple(indexes[1:]), "files": {**kept, **files}}
    return old.model_copy(update=update)


def _names(manifest: Manifest) -> str:
    return ", ".join(index.recipe for index in manifest.indexes)


def _rewrite(path: Path, change: Callable[[Manifest], Manifest]) -> Manifest:
    Manifest.load(path)  # for the better error: the folder may not exist
    with locked(path, wait=True, doing="changing the manifest"):
        new = change(Manifest.load(path))
        new.save(path)
    return new
