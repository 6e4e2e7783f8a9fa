"""Targets of a small store, and what kills the making of them."""

from pathlib import Path

import pytest

from knnlm.datastore.layout import FileRecord
from knnlm.evaluation.memory_targets import build_targets
from knnlm.index.build import build_index
from knnlm.memory.manifest import TargetsManifest
from knnlm.testing import TEXTS, toy_datastore

TWINS = (*TEXTS, TEXTS[0])  # the first document comes twice, so that every entry of it has an exact twin
T, K = 2.0, 24


class Killed(Exception):
    pass


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("memory") / "store"
    path = toy_datastore(store, texts=TWINS)
    build_index(path, "ivf4,flat")
    return store


def make(store: Path, out: Path, **options: object) -> TargetsManifest:
    given: dict[str, object] = {"ks": [K], "temperature": T, "part_entries": 100, **options}
    return build_targets(store, "toy", "no model is needed", out, **given)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, FileRecord]:
    return {f.name: FileRecord.of(f) for f in folder.iterdir() if f.name != "targets.json"}
