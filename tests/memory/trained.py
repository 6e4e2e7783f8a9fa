"""Memories trained in seconds, once for all files that look at them."""

from pathlib import Path
from typing import Any

import pytest

from knnlm.evaluation.memory_training import MlpSizes, train_memory
from knnlm.lm.distillation import DistilSettings, Tried
from knnlm.memory.manifest import MemoryManifest
from tests.memory.conftest import World

SETTINGS = DistilSettings(
    steps=24, batch_entries=600, pass_tokens=400, learning_rate=1e-2, warmup_steps=4, evaluate_steps=6
)
MLP = MlpSizes(hidden=48, layers=2, bottleneck=16)


class Stopped(Exception):
    pass


class Step:
    """Remembers what a run reports, and stops it after step `last`."""

    def __init__(self, last: int = 1 << 30) -> None:
        self.last = last
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.tried: list[Tried] = []

    def __call__(self, step: int, loss: float, excess: float, tried: Tried | None) -> None:
        assert excess >= 0
        if step > self.last:
            raise Stopped
        self.steps.append(step)
        self.losses.append(loss)
        self.tried += [tried] if tried else []


def run(world: World, out: Path, settings: DistilSettings = SETTINGS, **options: Any) -> MemoryManifest:  # Any: as it
    given = {"targets": None if settings.beta == 0 else world.targets, "device": "cpu", **options}
    if given.get("kind") == "mlp":
        given.setdefault("sizes", MLP)
    return train_memory(world.store, "law", world.held_out, str(world.model), out, settings, **given)


@pytest.fixture(scope="session")
def decoder(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MemoryManifest]:
    out = tmp_path_factory.mktemp("trained") / "decoder"
    return out, run(world, out)


@pytest.fixture(scope="session")
def mlp(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MemoryManifest]:
    out = tmp_path_factory.mktemp("trained") / "mlp"
    return out, run(world, out, kind="mlp")
