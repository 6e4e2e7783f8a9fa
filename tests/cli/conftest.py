"""A tiny model, a corpus and a built store, once per run; and the command as a function."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from knnlm.cli.main import run
from tests.lm import tiny_models

WORDS = ["the", "cat", "dog", "mat", "log", "hat", "sat", "ran", "saw", "on", "under", "and", "but", "quickly"]


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:  # Any: JSON
        """The one document on standard output."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out)


Knnlm = Callable[..., Answer]


@pytest.fixture
def knnlm(capsys: pytest.CaptureFixture[str]) -> Knnlm:
    """Runs `knnlm ARGUMENTS...` in this process."""

    def call(*arguments: object) -> Answer:
        capsys.readouterr()
        code = run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session", autouse=True)
def quick_timing() -> Iterator[None]:
    """How fast each way to search is takes seconds to measure well, and no test asks how well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("knnlm.evaluation.search_settings.TIMING_SECONDS", 0.005)
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_models.save(tiny_models.random_model(tiny_models.CONFIGS["llama"]()), folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents of a small language, of which `--part` makes three parts."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [{"id": f"d{i}", "text": " ".join(rng.choices(WORDS, k=20))} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, model: Path, corpus: Path) -> Path:
    """A store with domain "toy", version v1, tuned."""
    store = tmp_path_factory.mktemp("built") / "store"
    common = ["--model", str(model), "--store", str(store)]
    assert run(["build", "toy", str(corpus), "--part", "store", *common]) == 0
    assert run(["tune", "toy", str(corpus), "--part", "tune", *common]) == 0
    return store


@pytest.fixture
def store(built: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `built` that a test may change; it and the model are the defaults of every command."""
    copy = tmp_path / "store"
    shutil.copytree(built, copy)
    monkeypatch.setenv("KNNLM_STORE", str(copy))
    monkeypatch.setenv("KNNLM_MODEL", str(model))
    return copy
