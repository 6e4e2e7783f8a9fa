"""The demo's memory: trained once, again when its domain has moved on, and served where it is there."""

from pathlib import Path

import pytest

from demo import run, services
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.updates.documents import remove
from knnlm.memory.manifest import MemoryManifest, StoreRecord
from knnlm.testing import toy_datastore


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What the demo runs; the memory's folder comes to be, and its domain answers from its first version."""
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(services, "RUN", tmp_path)
    monkeypatch.setattr(services, "STORE", tmp_path / "store")
    monkeypatch.setattr(services, "MEMORY", tmp_path / "memories" / "toy")
    monkeypatch.setattr(services, "PID", tmp_path / "serve.pid")

    def knnlm(*arguments: str | Path) -> None:
        ran.append(tuple(map(str, arguments)))
        if arguments[1] == "train":
            services.MEMORY.mkdir(parents=True)

    monkeypatch.setattr(run, "_knnlm", knnlm)
    toy_datastore(tmp_path / "store")
    return ran


def test_it_is_trained_on_targets_of_its_domain_and_again_once_that_moved_on(
    commands: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--memory" not in services.command()
    run._train_memory()
    assert [c[:3] for c in commands] == [("memory", "targets", "toy"), ("memory", "train", "toy")]
    made = commands[0][commands[0].index("--out") + 1]
    assert commands[1][commands[1].index("--targets") + 1] == made
    assert services.command()[-2:] == ["--memory", f"toy={services.MEMORY}"]

    catalog = Catalog(tmp_path / "store")
    learnt = StoreRecord.of(current(catalog))
    monkeypatch.setattr(MemoryManifest, "open", lambda _: Learnt(learnt))
    run._train_memory()
    assert len(commands) == 2  # it is there
    remove(["0"], catalog, "toy", activate=catalog.activate)
    run._train_memory()
    assert len(commands) == 4


class Learnt:
    def __init__(self, store: StoreRecord) -> None:
        self.store = store


def current(catalog: Catalog) -> Manifest:
    return Manifest.load(catalog.path("toy", catalog.current("toy") or ""))
