"""Every byte of a version damaged, one at a time: verifying notices, and a service goes on answering from another."""

import asyncio
from pathlib import Path

import pytest

from knnlm.datastore.layout import is_keys
from tests.faults.corruption import damaged_beside, every_byte_is_noticed
from tests.faults.damage import RECIPES, indexed
from tests.faults.figures import report

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_byte_of_every_file_is_verified(recipe: str, tmp_path: Path) -> None:
    path = indexed(tmp_path, recipe)
    counts = {file.name: every_byte_is_noticed(file, most=3000) for file in sorted(path.iterdir())}
    report("corruption.verify", recipe=recipe, flips=counts, unnoticed=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_service_never_serves_a_damaged_version(recipe: str, tmp_path: Path) -> None:
    indexed(tmp_path, recipe)
    refused, served = asyncio.run(damaged_beside(tmp_path, most=150))
    assert all(is_keys(name) for name in served), served
    report("corruption.serving", recipe=recipe, refused=refused, served=served)
