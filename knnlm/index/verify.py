"""Every byte of a version as knnlm.datastore.verify reads it, and whether its indexes are those of its keys."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from knnlm.datastore import verify as files
from knnlm.datastore.layout import KEYS
from knnlm.datastore.manifest import IndexRecord, Manifest
from knnlm.datastore.reader import Datastore
from knnlm.datastore.verify import Check
from knnlm.errors import KnnlmError
from knnlm.index.contract import Keys, sample_rows, to_float32
from knnlm.index.table import family

__all__ = ["Check", "verify"]

SAMPLED_ENTRIES = 256
MIN_AGREEING = 0.9  # share of the sample: the last bit of a sum may decide between two lists or codes


def verify(path: Path) -> Iterator[Check]:
    """Check the version in folder `path` as knnlm.datastore.verify.verify does; then, where the files are sound, open
    each of its indexes, and of each shard those that the version has."""
    sound = True
    for check in files.verify(path):
        sound = sound and check.problem is None
        yield check
    if not sound:
        return
    manifest = Manifest.load(path)
    for shard in manifest.shards:
        for check in _indexes(path / shard.name, manifest.indexes):
            yield Check(f"{shard.name}/{check.name}", check.problem)
    if not manifest.shards:
        yield from _indexes(path, manifest.indexes)


def _indexes(folder: Path, wanted: tuple[IndexRecord, ...]) -> Iterator[Check]:
    """wanted: what the version has; a shard has each of them, with a file of its own."""
    mine = {index.recipe: index for index in Manifest.load(folder).indexes}
    for index in wanted:
        if index.file is None:
            continue
        name = f"index {index.recipe}: is of these keys"
        found = mine.get(index.recipe)
        if found is None or found.model_copy(update={"file": index.file}) != index:
            yield Check(name, "is missing, or not what was trained for all shards")
            continue
        try:
            yield Check(name, _index_problem(Datastore.open(folder).keys, folder, found))
        except KnnlmError as err:
            yield Check(name, err.message)


def _index_problem(keys: Keys, folder: Path, record: IndexRecord) -> str | None:
    """keys: (n, d), that it should be built from."""
    file = folder / str(record.file)
    index = family(record.recipe).open(keys, file, record.parameters, resident=False)
    entries = index.grouped()
    if entries is not None and not np.array_equal(np.sort(entries), np.arange(len(keys))):
        return f"does not hold each of the entries [0, {len(keys)}) once"
    rows = sample_rows(len(keys), SAMPLED_ENTRIES, 0)
    agreeing = index.made_of(to_float32(keys[rows]), rows)
    if agreeing is not None and agreeing.mean() < MIN_AGREEING:
        return f"is not built from {KEYS}: {int(agreeing.sum())} of {len(rows)} entries are what their keys give"
    return None
