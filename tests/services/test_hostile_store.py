"""Versions whose files lie, with checksums that are right: refused by name, or answered from; never anything else."""

import shutil
from pathlib import Path

import pytest

from tests.faults.damage import indexed
from tests.faults.hostile import FILES, LARGE, MANIFESTS
from tests.faults.reading import bounded, outcome

CASES = {**MANIFESTS, **FILES}
SLOW = {"twenty thousand files"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = indexed(tmp_path_factory.mktemp("store"), "ivf8,sq8")
    assert outcome(path) == ""
    return path


@pytest.mark.parametrize(
    "name", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in sorted(set(CASES) - LARGE)]
)
def test_a_version_that_lies_is_refused_or_answers(name: str, sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "toy" / "v1"
    shutil.copytree(sound, path)
    CASES[name](path)
    with bounded():
        outcome(path)
