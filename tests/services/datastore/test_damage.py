"""A damaged version is noticed on disk and never served; a sample of tests/faults/test_corruption.py."""

import asyncio
from pathlib import Path

import pytest

from knnlm.datastore.layout import is_keys
from tests.faults.corruption import (
    CURRENTS,
    current_is_anything,
    damaged_beside,
    every_byte_is_noticed,
    lies_beside,
    replaced_beside,
)
from tests.faults.damage import RECIPES, indexed
from tests.faults.hostile import FILES, MANIFESTS

LIES = ("deep lists", "an unknown field", "tuning k 1099511627776", "parameter nprobe 0", "entries 3", "a file outside")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_changed_byte_is_noticed_and_never_served(recipe: str, tmp_path: Path) -> None:
    path = indexed(tmp_path, recipe)
    for file in sorted(path.iterdir()):
        most = 60 if file.stat().st_size > 200 else 200  # every byte of the documents: a changed id breaks no relation
        assert every_byte_is_noticed(file, most) >= 60
    refused, served = asyncio.run(damaged_beside(tmp_path, most=8))
    assert set(refused) == {file.name for file in path.iterdir()}, "not one change of some file was refused"
    assert set(served) <= {name for name in refused if is_keys(name)}


def test_changed_keys_are_refused_when_all_is_checked(tmp_path: Path) -> None:
    indexed(tmp_path, "ivf8,sq8")
    _, served = asyncio.run(damaged_beside(tmp_path, most=8, check="all"))
    assert not served


def test_files_that_are_cut_short_missing_or_something_else_are_refused(tmp_path: Path) -> None:
    indexed(tmp_path, "ivf8,sq8")
    assert len(asyncio.run(replaced_beside(tmp_path))) == 42  # 7 files, 6 ways


@pytest.mark.parametrize("name", sorted(CURRENTS))
def test_whatever_current_holds_the_service_goes_on(name: str, tmp_path: Path) -> None:
    indexed(tmp_path, "ivf8,sq8")
    asyncio.run(current_is_anything(tmp_path, name))


@pytest.mark.parametrize("name", [*LIES, "documents are deep lists"])
def test_a_version_that_lies_harms_neither_the_service_nor_other_domains(name: str, tmp_path: Path) -> None:
    indexed(tmp_path, "ivf8,sq8")
    asyncio.run(lies_beside(tmp_path, {**MANIFESTS, **FILES}[name]))
