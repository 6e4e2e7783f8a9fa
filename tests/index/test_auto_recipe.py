"""What is chosen is up to measurements; that it can be built, fits and is explained is not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.index.auto_recipe import auto_recipe
from knnlm.index.ivf import lists_for
from knnlm.index.table import family


@given(st.integers(0, 10**9), st.integers(1, 4096), st.one_of(st.none(), st.integers(0, 10**12)))
def test_what_is_chosen_suits_and_says_why(entries: int, dim: int, memory: int | None) -> None:
    choice = auto_recipe(entries, dim, memory)
    assert family(choice.recipe).why_unsuitable(entries, dim) is None
    assert choice.reasons
    assert all(reason.strip() and "\n" not in reason for reason in choice.reasons)


def test_few_entries_are_searched_exactly() -> None:
    assert auto_recipe(0, 256).recipe == auto_recipe(1000, 256).recipe == "flat"


def test_many_are_not() -> None:
    assert family(auto_recipe(10**6, 256).recipe).has_file


@pytest.mark.parametrize("dim", [256, 1024])
def test_without_the_memory_for_codes_they_stay_in_the_file(dim: int) -> None:
    enough, little = auto_recipe(10**7, dim, 10**12), auto_recipe(10**7, dim, 10**8)
    assert "fs" in enough.recipe
    assert "fs" not in little.recipe
    assert any("of memory" in reason for reason in little.reasons)
    assert auto_recipe(10**7, dim) == enough


def test_dimensions_that_cannot_be_cut_still_get_an_index() -> None:
    assert auto_recipe(10**6, 251).recipe.endswith("sq8")


@given(st.integers(0, 10**10))
def test_lists_are_more_for_more_keys_and_never_starve(entries: int) -> None:
    lists = lists_for(entries)
    assert lists >= 1
    assert lists == 1 or entries / lists >= 39  # below, FAISS warns
    assert lists <= lists_for(2 * entries)
