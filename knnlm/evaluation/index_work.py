"""The folder in which an index report works: indexes built aside, and what has been found out with them.

Every name holds a digest of what its content follows from, and every file appears whole: so an interrupted report is
taken up where it was, and nothing of another datastore, other queries or another version of this program is.
"""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import ValidationError

import knnlm
from knnlm.datastore.files import disk_errors, write_atomic
from knnlm.datastore.layout import REMOVED, Record, is_keys
from knnlm.datastore.reader import Datastore
from knnlm.errors import InvalidRequest
from knnlm.index.added import added_bytes
from knnlm.index.memory import require
from knnlm.index.searcher import Searcher
from knnlm.index.table import family
from knnlm.neighbors import Neighbors

__all__ = ["Built", "ReportFolder"]

R = TypeVar("R", bound=Record)


class Built(Record):
    """parameters: as `Family.build` returned them."""

    build_seconds: float
    parameters: dict[str, int | float]


class ReportFolder:
    """`folder` exists, and nobody else works in it."""

    def __init__(self, folder: Path, datastore: Datastore, seed: int) -> None:
        self.datastore = datastore
        self._folder = folder
        self._seed = seed
        files = datastore.manifest.files
        searched = [(name, files[name].sha256) for name in sorted(files) if is_keys(name) or name == REMOVED]
        self._made_from = (knnlm.__version__, searched, seed)

    def built(self, recipe: str) -> Built:
        """Build the index, if that has not been done."""
        file, chosen = self._index_file(recipe), family(recipe)

        def build() -> Built:
            building = file.with_name("." + file.name)
            begun = time.perf_counter()
            parameters = chosen.build(self.datastore.keys, building, self._seed, _ignored)
            seconds = time.perf_counter() - begun
            if chosen.has_file:
                with disk_errors(file):
                    building.replace(file)
            return Built(build_seconds=seconds, parameters=dict(parameters))

        return self.kept(Built, build, "index", recipe)

    def opened(self, recipe: str) -> Searcher:
        """The datastore with this index, warm. Raises InsufficientMemory when there is no room for it beside others."""
        built, chosen = self.built(recipe), family(recipe)
        file = self._index_file(recipe) if chosen.has_file else None
        needed = chosen.resident_bytes(self.datastore.keys, file, resident=False)
        require(needed + added_bytes(self.datastore, chosen, resident=False), self.datastore.path)
        index = chosen.open(self.datastore.keys, file, built.parameters, resident=False)
        index.warm()
        return Searcher(self.datastore, index, recipe=recipe)

    def kept(self, record: type[R], make: Callable[[], R], kind: str, *made_from: object) -> R:
        """What `make` gives, which follows from `made_from` and the keys: made once."""
        file = self._named(kind, ".json", *made_from)
        try:
            return record.model_validate_json(file.read_bytes())
        except (FileNotFoundError, ValidationError):  # of another version of this program: made anew
            made = make()
        write_atomic(file, made.model_dump_json(indent=2).encode())
        return made

    def kept_neighbors(self, find: Callable[[], Neighbors], *made_from: object) -> Neighbors:
        """`kept` for neighbors, with their ids."""
        file = self._named("neighbors", ".npz", *made_from)
        if not file.exists():
            found = find()
            if found.ids is None:
                raise InvalidRequest("neighbors are kept with their ids, there are none", param="ids")
            building = file.with_name("." + file.name)
            with disk_errors(file):
                np.savez(building, distances=found.distances, values=found.values, ids=found.ids)
                building.replace(file)
        with np.load(file, allow_pickle=False) as arrays:
            return Neighbors(arrays["distances"], arrays["values"], arrays["ids"])

    def _index_file(self, recipe: str) -> Path:
        return self._named("index", ".faiss", recipe)

    def _named(self, kind: str, suffix: str, *made_from: object) -> Path:
        text = repr((*self._made_from, *made_from))
        return self._folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:20]}{suffix}"


def _ignored(done: int, total: int) -> None:
    del done, total
