"""The index of a version of shards: trained once on a sample of all keys, then each shard's keys are added to it.

So all shards have the same lists, codes and pre-transform. Each step can be done in any process that sees the folders,
and done again: what is finished stays. First every shard gets the new index beside its others; then the version names
it; then the shards let go of what it replaced. Killed at any moment, the version is what it was or has the new index.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from knnlm.datastore.arrays import open_array
from knnlm.datastore.files import write_atomic
from knnlm.datastore.layout import KEYS, FileRecord
from knnlm.datastore.manifest import IndexRecord, Manifest
from knnlm.datastore.shards import shard_folders
from knnlm.datastore.updates.revise import with_default_index, with_index, without_index
from knnlm.errors import Conflict, DatastoreError
from knnlm.index.contract import Int64, sample_rows
from knnlm.index.files import named, remove_unnamed
from knnlm.index.ivf import default_nprobe
from knnlm.index.table import family

__all__ = [
    "Added", "add_shard", "build_sharded_index", "joined", "remove_sharded_index", "settle", "share_parameters",
    "train_shards",
]  # fmt: skip

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Added:
    """One shard's part of an index. sizes: of its lists; None where there are none."""

    index: IndexRecord
    sizes: Int64 | None


def train_shards(folders: Sequence[Path], recipe: str, seed: int, into: Path) -> IndexRecord:
    """What all shards' indexes of a recipe begin with, learned from the keys that one index of all of them would be
    learned from, written into folder `into`. Memory: the sample. Raises as `Family.train` does."""
    chosen = family(recipe)
    if not chosen.has_file:
        return IndexRecord(recipe=recipe)
    keys = [open_array(folder / KEYS, (m.entries, m.key_dim), m.key_dtype) for folder, m in _manifests(folders)]
    dim = keys[0].shape[1]
    entries = sum(map(len, keys))
    sample = np.empty((min(chosen.training_size(dim), entries), dim), np.float32)
    rows, first = sample_rows(entries, len(sample), seed), 0
    for part in keys:
        here = (rows >= first) & (rows < first + len(part))
        sample[here] = part[rows[here] - first]
        first += len(part)
    building = into / ".index.trained"
    write_atomic(building, chosen.train(sample, seed))
    ((name, record),) = named(building, "trained").items()
    return IndexRecord(recipe=recipe, file=name, trained=record.sha256)


def add_shard(folder: Path, trained: Path, index: IndexRecord) -> Added:
    """Give the shard in `folder` its part of `index`, which was trained into the file `trained`; beside its others, and
    not at all when it has it. Raises as `Family.add` does."""
    chosen, manifest = family(index.recipe), Manifest.load(folder)
    mine = next((i for i in manifest.indexes if (i.recipe, i.trained) == (index.recipe, index.trained)), None)
    if mine is None:
        building = (
            folder / f".index.{secrets.token_hex(4)}.building"
        )  # another worker may be at it, or what is left of it
        keys = open_array(folder / KEYS, (manifest.entries, manifest.key_dim), manifest.key_dtype)
        parameters = chosen.add(trained.read_bytes(), keys, building, _silent)
        files = named(building)
        mine = index.model_copy(update={"file": next(iter(files)), "parameters": dict(parameters)})
        with_index(folder, mine, files, beside=True)
    return Added(mine, None if mine.file is None else chosen.list_sizes(folder / mine.file))


def joined(added: Sequence[Added], index: IndexRecord) -> IndexRecord:
    """`index` with the defaults of its searches: how many lists are visited follows from all keys together. All
    candidates are rescored, since shards are merged by distance."""
    if not added:
        return index
    parameters = {name: value for name, value in added[0].index.parameters.items() if name != "rescored"}
    sizes = [part.sizes for part in added if part.sizes is not None]
    if "nprobe" in parameters and sizes:
        parameters["nprobe"] = default_nprobe(np.sum(sizes, axis=0, dtype=np.int64))
    return index.model_copy(update={"parameters": parameters})


def settle(folders: Sequence[Path], default: str, kept: Sequence[str]) -> None:
    """Make the index of recipe `default` that of the shards in `folders`, and remove those that are not `kept`."""
    for folder in folders:
        with_default_index(folder, default)
        for other in Manifest.load(folder).other_indexes:
            if other.recipe not in kept:
                without_index(folder, other.recipe)
        remove_unnamed(folder)
        for leftover in folder.glob(".index.*.building"):
            leftover.unlink()


def share_parameters(folders: Sequence[Path], index: IndexRecord) -> None:
    """Give the shards' parts of `index` the defaults of searches that it has."""
    for folder in folders:
        for part in Manifest.load(folder).indexes:
            if part.recipe == index.recipe and part.parameters != index.parameters:
                with_index(folder, part.model_copy(update={"parameters": index.parameters}), {}, beside=True)


def build_sharded_index(path: Path, recipe: str, *, seed: int, beside: bool, on_progress: Report | None = None) -> None:
    """Index the version of shards in folder `path`, as knnlm.index.build.build_index does, which holds the lock."""
    manifest, report = Manifest.load(path), on_progress or _silent
    folders = list(shard_folders(path, manifest))
    report(0, manifest.entries)
    index = train_shards(folders, recipe, seed, path)
    known = next((i for i in manifest.indexes if i.recipe == recipe), index)
    if known.trained != index.trained:
        raise Conflict(
            f"{path} has index {recipe} of another training: its shards would be searched with two of them meanwhile; "
            "build one of another recipe, make that the default, and remove this one first",
            param="recipe",
        )
    files: dict[str, FileRecord] = {}
    if index.file is not None:
        files[index.file] = FileRecord.of(path / index.file)
        added, done = [], 0
        for folder, shard in zip(folders, manifest.shards, strict=True):
            added.append(add_shard(folder, path / index.file, index))
            done += shard.entries
            report(done, manifest.entries)
        index = joined(added, index)
        share_parameters(folders, index)
    after = with_index(path, index, files, beside=beside)
    settle(folders, after.index.recipe, [i.recipe for i in after.indexes])


def remove_sharded_index(path: Path, recipe: str) -> None:
    """Take an index from a version of shards. Raises as `without_index` does."""
    after = without_index(path, recipe)
    settle(list(shard_folders(path, after)), after.index.recipe, [i.recipe for i in after.indexes])


def _manifests(folders: Sequence[Path]) -> list[tuple[Path, Manifest]]:
    if not folders:
        raise DatastoreError("a version of shards without shards")
    return [(folder, Manifest.load(folder)) for folder in folders]


def _silent(done: int, total: int) -> None:
    del done, total
