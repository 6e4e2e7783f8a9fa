"""What the programs about the index compare is what they say: the paper's recipe, and a tenth of the entries."""

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import engine, scaling
from benchmarks.__main__ import programs
from knnlm.datastore.reader import Datastore
from knnlm.index.table import family
from tests.index.helpers import brute_force, clustered, datastore

ENTRIES, DIM = 600, 16


@pytest.fixture
def opened(tmp_path: Path) -> Datastore:
    return Datastore.open(datastore(tmp_path / "store", clustered(ENTRIES, DIM), key_dtype="float16"))


def test_exact_search_in_faiss_finds_the_nearest_and_their_values(opened: Datastore) -> None:
    queries = clustered(5, DIM, seed=1)
    found = engine.faiss_search(engine.exact_index(opened.keys), opened.values, None)(queries)
    distances, ids = brute_force(opened.keys, queries, ENTRIES)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(found.values[:, :5], opened.values[ids[:, :5]])


def test_what_was_not_found_is_padding(opened: Datastore) -> None:
    index = engine.exact_index(opened.keys[:0])
    index.add(np.zeros((1, DIM), np.float32))

    class Missing:
        ntotal = 2

        def search(self, queries: np.ndarray, k: int, params: object) -> tuple[np.ndarray, np.ndarray]:
            assert (k, params) == (2, None)
            return np.zeros((len(queries), 2), np.float32), np.array([[0, -1]] * len(queries))

    found = engine.faiss_search(Missing(), opened.values, None)(np.zeros((3, DIM), np.float32))
    assert (found.values[:, 0] == opened.values[0]).all()
    assert (found.values[:, 1] == -1).all()


def test_codes_cut_a_key_into_equal_parts() -> None:
    assert [engine.code_bytes(dim) for dim in (256, 768, 100, 31)] == [64, 64, 50, 31]


def test_a_tenth_is_every_tenth_entry_with_its_value(
    opened: Datastore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "FOLDER", tmp_path / "bench")
    small = scaling.tenth(opened)
    assert small.manifest.entries == ENTRIES // 10
    np.testing.assert_array_equal(small.keys, opened.keys[::10])
    np.testing.assert_array_equal(small.values, opened.values[::10])
    assert isinstance(small.keys, np.memmap)


def test_both_sizes_have_the_default_kind_of_index_with_lists_of_their_own() -> None:
    small, large = scaling.recipe_for(10_000, 256), scaling.recipe_for(100_000, 256)
    assert re.sub(r"ivf\d+", "", small) == re.sub(r"ivf\d+", "", large)
    assert small != large
    assert family(small).why_unsuitable(10_000, 256) is None


def test_all_programs_are_run_by_make_bench() -> None:
    assert {"engine", "families", "scaling", "endpoint", "latency"} <= set(programs())
