"""What is excluded might as well not be stored: every search here has a twin that searches the rest alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm.datastore.reader import Datastore
from knnlm.errors import InvalidRequest
from knnlm.index.build import build_index
from knnlm.index.contract import MISSING_DISTANCE
from knnlm.index.exclusion import Exclusion, without
from knnlm.index.searcher import Searcher
from knnlm.messages import SearchRequest
from knnlm.neighbors import Neighbors, neighbor_log_probs
from knnlm.testing import TEXTS, ToyLanguageModel, toy_datastore
from tests.index.helpers import brute_force, clustered
from tests.searching import asking, search

DIM = 4
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


class Exact:
    """A search by brute force, which writes down how many candidates were wanted for each query. Pads at zero.

    most: no query finds more than this, as when the lists it looks into hold no more. unsteady: what is found depends
    on the query and on how many candidates are wanted, as it does in an approximate index.
    """

    def __init__(self, keys: Float32, most: int | None = None, *, unsteady: bool = False) -> None:
        self.keys = keys
        self.most = len(keys) if most is None else most
        self.unsteady = unsteady
        self.wanted: dict[bytes, list[int]] = {}
        self.calls = 0

    def __call__(self, queries: Float32, c: int) -> tuple[Float32, Int64]:
        self.calls += 1
        assert c <= len(self.keys)
        distances, ids = np.zeros((len(queries), c), np.float32), np.full((len(queries), c), -1, np.int64)
        for row, query in enumerate(queries):
            self.wanted.setdefault(query.tobytes(), []).append(c)
            known = np.arange(len(self.keys))
            if self.unsteady:
                known = known[(known * 7 + c + int(abs(query[0]) * 100)) % 5 > 0]
            near, order = brute_force(self.keys[known], query[None], min(c, self.most))
            distances[row, : order.size], ids[row, : order.size] = near[0], known[order[0]]
        return distances, ids


def ranges(*pairs: tuple[int, int]) -> tuple[Int64, Int64]:
    array = np.array(pairs, np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def excluding(own: list[tuple[int, int]], shared: list[tuple[int, int]]) -> Exclusion:
    return Exclusion(*ranges(*own), *ranges(*shared))


def twin(keys: Float32, queries: Float32, k: int, exclusion: Exclusion) -> tuple[Float32, Int64]:
    """Searches what is left, query by query."""
    distances, ids = np.full((len(queries), k), MISSING_DISTANCE, np.float32), np.full((len(queries), k), -1, np.int64)
    for row, query in enumerate(queries):
        left = np.ones(len(keys), np.bool_)
        left[exclusion.lows[row] : exclusion.highs[row]] = False
        for start, end in zip(exclusion.starts, exclusion.ends, strict=True):
            left[start:end] = False
        kept = np.flatnonzero(left)
        near, order = brute_force(keys[kept], query[None], k)
        distances[row, : order.size], ids[row, : order.size] = near[0], kept[order[0]]
    return distances, ids


@st.composite
def cases(draw: st.DrawFn) -> tuple[Float32, Float32, int, Exclusion]:
    """Documents one after another, some of them excluded for all; queries each with nothing, an entry or a document."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    ends = np.cumsum(lengths)
    documents = list(zip((ends - lengths).tolist(), ends.tolist(), strict=True))
    shared = draw(st.lists(st.sampled_from(documents), unique=True, max_size=3))
    entry = st.integers(0, int(ends[-1]) - 1).map(lambda i: (i, i + 1))
    own = draw(st.lists(st.just((0, 0)) | entry | st.sampled_from(documents), min_size=1, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    keys = rng.integers(-2, 3, (int(ends[-1]), DIM)).astype(np.float32)  # few values, so that many keys are equal
    queries = rng.standard_normal((len(own), DIM)).astype(np.float32)
    return keys, queries, draw(st.integers(1, 50)), excluding(own, sorted(shared))


@given(cases())
def test_it_is_as_if_the_rest_were_all_there_is(case: tuple[Float32, Float32, int, Exclusion]) -> None:
    keys, queries, k, exclusion = case
    distances, ids = without(Exact(keys), queries, k, exclusion, len(keys))
    expected = twin(keys, queries, k, exclusion)
    np.testing.assert_array_equal(distances, expected[0])
    np.testing.assert_array_equal(ids, expected[1])
    assert (distances.dtype.name, ids.dtype.name) == ("float32", "int64")


@given(cases())
def test_the_answer_to_a_query_does_not_depend_on_the_others(case: tuple[Float32, Float32, int, Exclusion]) -> None:
    keys, queries, k, exclusion = case
    together = without(Exact(keys, unsteady=True), queries, k, exclusion, len(keys))
    for row in range(len(queries)):
        alone = replace(exclusion, lows=exclusion.lows[row : row + 1], highs=exclusion.highs[row : row + 1])
        one = without(Exact(keys, unsteady=True), queries[row : row + 1], k, alone, len(keys))
        np.testing.assert_array_equal(together[0][row], one[0][0])
        np.testing.assert_array_equal(together[1][row], one[1][0])


def test_a_query_that_excludes_nothing_costs_nothing_more() -> None:
    keys, queries = clustered(60, DIM), clustered(3, DIM, seed=1)
    search = Exact(keys)
    without(search, queries, 5, excluding([(0, 0), (7, 8), (10, 30)], []), 60)
    wanted = [search.wanted[query.tobytes()][0] for query in queries]
    assert wanted == [5, 6, 10]


def test_documents_of_about_one_size_are_searched_together() -> None:
    keys, queries = clustered(200, DIM), clustered(3, DIM, seed=1)
    search = Exact(keys)
    without(search, queries, 50, excluding([(0, 17), (20, 45), (100, 132)], []), 200)
    assert search.calls == 1
    assert [search.wanted[query.tobytes()] for query in queries] == [[82]] * 3


def test_a_document_that_is_all_that_is_near_is_looked_behind() -> None:
    near, far = np.zeros((100, DIM), np.float32), np.ones((20, DIM), np.float32)
    keys = np.concatenate([far[:10], near, far[10:]])
    search = Exact(keys)
    query = np.zeros((1, DIM), np.float32)
    distances, ids = without(search, query, 8, excluding([(10, 110)], []), 120)
    np.testing.assert_array_equal(ids, [[0, 1, 2, 3, 4, 5, 6, 7]])
    np.testing.assert_array_equal(distances, np.full((1, 8), DIM))
    assert search.wanted[query.tobytes()] == [16, 32, 64, 120]


def test_only_the_queries_with_too_few_left_are_searched_again() -> None:
    keys = np.concatenate([np.zeros((40, DIM), np.float32), np.ones((40, DIM), np.float32)])
    queries = np.array([np.full(DIM, 0.1), np.full(DIM, 0.9)], np.float32)
    search = Exact(keys)
    _, ids = without(search, queries, 4, excluding([(0, 40), (0, 40)], []), 80)
    np.testing.assert_array_equal(ids, [[40, 41, 42, 43]] * 2)
    assert search.wanted[queries[0].tobytes()] == [8, 16, 32, 64]
    assert search.wanted[queries[1].tobytes()] == [8]


def test_an_index_that_finds_no_more_is_not_asked_for_more() -> None:
    keys = clustered(200, DIM)
    query = clustered(1, DIM, seed=1)
    search = Exact(keys, most=30)
    distances, ids = without(search, query, 20, excluding([(0, 0)], [(0, 150)]), 200)
    expected = brute_force(keys, query, 30)[1][0]
    expected = expected[expected >= 150]
    assert 0 < len(expected) < 20
    np.testing.assert_array_equal(ids[0], np.pad(expected, (0, 20 - len(expected)), constant_values=-1))
    assert (distances[0, len(expected) :] == MISSING_DISTANCE).all()
    assert search.calls == 1


def test_when_everything_is_excluded_nothing_is_found() -> None:
    keys = clustered(50, DIM)
    distances, ids = without(
        Exact(keys), clustered(3, DIM, seed=1), 7, excluding([(0, 0)] * 3, [(0, 20), (20, 50)]), 50
    )
    assert (ids == -1).all()
    assert (distances == MISSING_DISTANCE).all()


def test_no_query_is_no_search() -> None:
    search = Exact(clustered(50, DIM))
    nothing = np.empty((0, DIM), np.float32)
    assert without(search, nothing, 7, excluding([], [(0, 5)]), 50)[1].shape == (0, 7)
    assert search.calls == 0


@settings(max_examples=50, deadline=None)
@given(cases())
def test_counts_are_those_of_distinct_entries(case: tuple[Float32, Float32, int, Exclusion]) -> None:
    keys, queries, _, exclusion = case
    for row, count in enumerate(exclusion.counts()):
        held = exclusion.holds(np.arange(-1, len(keys))[None], np.array([row]))
        assert not held[0, 0]
        assert held.sum() == count
        assert (twin(keys, queries, len(keys), exclusion)[1][row] >= 0).sum() == len(keys) - count


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents "0" to "4", of which "3" has no entry; float32, so that distances are those of the twin."""
    texts = [*TEXTS[:3], "", TEXTS[3]]
    return toy_datastore(tmp_path_factory.mktemp("store"), texts=texts, key_dtype="float32")


def spans(path: Path) -> dict[str, tuple[int, int]]:
    """The entries of every document, counted from the text: a token and BOS less one, for the first is no entry."""
    found, start = {}, 0
    for i, text in enumerate([*TEXTS[:3], "", TEXTS[3]]):
        entries = len(ToyLanguageModel().tokenizer.encode(text)) - 1
        found[str(i)] = (start, start + entries)
        start += entries
    assert start == Datastore.open(path).manifest.entries
    return found


def asked(n: int = 4, **fields: Any) -> SearchRequest:  # Any: of the field's type
    return asking(search("toy", clustered(n, 16, seed=2), 5, ids=True), **fields)


def entries(*numbers: int) -> Int64:
    return np.array(numbers, np.int64)


def test_documents_are_resolved_to_their_entries(path: Path) -> None:
    at = spans(path)
    found = Exclusion.of(asked(exclude_documents=("4", "0", "4", "3")), Datastore.open(path))
    assert found is not None
    assert list(zip(found.starts, found.ends, strict=True)) == [at["0"], at["4"]]
    np.testing.assert_array_equal(found.lows, found.highs)
    np.testing.assert_array_equal(found.counts(), at["0"][1] - at["0"][0] + at["4"][1] - at["4"][0])


def test_entries_are_resolved_to_their_documents_when_asked(path: Path) -> None:
    store, at = Datastore.open(path), spans(path)
    given = entries(at["0"][1] - 1, at["1"][0], -1, at["4"][0])
    alone = Exclusion.of(asked(exclude_entries=given), store)
    whole = Exclusion.of(asked(exclude_entries=given, exclude_own_documents=True), store)
    assert alone is not None
    assert whole is not None
    np.testing.assert_array_equal(alone.counts(), [1, 1, 0, 1])
    np.testing.assert_array_equal(alone.lows[[0, 1, 3]], given[[0, 1, 3]])
    documents = [at["0"], at["1"], at["4"]]
    assert list(zip(whole.lows[[0, 1, 3]], whole.highs[[0, 1, 3]], strict=True)) == documents
    assert whole.counts()[2] == 0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"exclude_documents": ("3",)},
        {"exclude_entries": entries(-1, -1, -1, -1)},
        {"exclude_entries": entries(-1, -1, -1, -1), "exclude_own_documents": True, "exclude_documents": ("3",)},
    ],
)
def test_what_excludes_no_entry_is_none(path: Path, fields: dict[str, Any]) -> None:
    assert Exclusion.of(asked(**fields), Datastore.open(path)) is None


def test_documents_of_one_id_are_all_excluded(tmp_path: Path) -> None:
    path = toy_datastore(tmp_path, texts=TEXTS[:2])
    file = path / "documents.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"id": "1"', b'"id": "0"'))
    found = Exclusion.of(asked(exclude_documents=("0",)), Datastore.open(path))
    assert found is not None
    assert found.counts()[0] == Datastore.open(path).manifest.entries


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"exclude_documents": ("0", "17")}, "exclude_documents", "names '17', which is no document of toy v1"),
    ({"exclude_documents": ("0",) * 1025}, "exclude_documents", "at most 1024 documents, got 1025"),
    ({"exclude_documents": ("0", "x" * 4097)}, "exclude_documents", "at most 4096 characters, got one of 4097"),
    ({"exclude_entries": entries(0, 1)}, "exclude_entries", r"int64 of shape \(4,\).*got int64 of shape \(2,\)"),
    ({"exclude_entries": entries(0, 1, 2, 3)[:, None]}, "exclude_entries", r"got int64 of shape \(4, 1\)"),
    ({"exclude_entries": np.zeros(4, np.int32)}, "exclude_entries", "got int32"),
    ({"exclude_entries": entries(0, 290, 1, 2)}, "exclude_entries", r"must lie in \[-1, 290\), got 290"),
    ({"exclude_entries": entries(0, -2, 1, 2)}, "exclude_entries", r"must lie in \[-1, 290\), got -2"),
    ({"exclude_own_documents": True}, "exclude_own_documents", "exclude_entries, which is not given"),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED)
def test_what_cannot_be_excluded_is_refused_by_name(
    path: Path, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        Exclusion.of(asked(**fields), Datastore.open(path))
    assert refused.value.param == param


SEARCHES: list[dict[str, Any]] = [
    {"exclude_entries": entries(3, 4, -1, 289)},
    {"exclude_entries": entries(0, 100, 200, 289), "exclude_own_documents": True},
    {"exclude_documents": ("1",)},
    {"exclude_documents": ("0", "4"), "exclude_entries": entries(0, -1, 100, 101), "exclude_own_documents": True},
    {"exclude_documents": ("0", "1", "2", "4")},
]


def probabilities(keys: Float32, values: npt.NDArray[np.int32], query: Float32, k: int, t: float) -> dict[int, float]:
    """p_kNN by its definition over the k nearest of these keys."""
    distances, ids = brute_force(keys, query[None], k)
    weights = np.exp(-(distances[0] - distances[0].min(initial=np.inf)) / t)
    p: dict[int, float] = {}
    for value, weight in zip(values[ids[0]].tolist(), weights, strict=True):
        p[value] = p.get(value, 0.0) + weight / weights.sum()
    return p


@pytest.mark.parametrize("fields", SEARCHES)
@pytest.mark.parametrize("k", [3, 40, 290])
def test_the_distribution_is_that_of_the_rest(path: Path, fields: dict[str, Any], k: int) -> None:
    store = Datastore.open(path)
    request = asked(queries=store.keys[[3, 100, 200, 289]], **fields)  # every query is stored itself
    exclusion = Exclusion.of(request, store)
    assert exclusion is not None
    keys, values = np.asarray(store.keys, np.float32), np.asarray(store.values)
    queries = request.queries.astype(np.float32)
    distances, ids = without(Exact(keys), queries, k, exclusion, len(keys))
    found = neighbor_log_probs(Neighbors(distances, np.where(ids >= 0, values[ids], -1).astype(np.int32)), 2.0)
    for row, query in enumerate(queries):
        left = ~exclusion.holds(np.arange(len(keys))[None], np.array([row]))[0]
        expected = probabilities(keys[left], values[left], query, k, 2.0)
        tokens, log_masses = found.row(row)
        assert tokens.tolist() == sorted(expected)
        np.testing.assert_allclose(np.exp(log_masses), [expected[token] for token in sorted(expected)], rtol=1e-5)


@pytest.mark.parametrize("recipe", ["flat", "ivf8,flat", "ivf8,sq8"])
@pytest.mark.parametrize("fields", SEARCHES)
def test_a_searcher_answers_as_if_the_rest_were_all_there_is(
    tmp_path: Path, recipe: str, fields: dict[str, Any]
) -> None:
    path = toy_datastore(tmp_path, texts=[*TEXTS[:3], "", TEXTS[3]], key_dtype="float32")
    build_index(path, recipe)
    store, searcher = Datastore.open(path), Searcher.open(path)
    # every list, and every entry a candidate: what is then found is exact after rescoring
    generous: dict[str, Any] = {} if recipe == "flat" else {"nprobe": 8, "overfetch": 100.0}
    request = asked(queries=np.asarray(store.keys[[3, 100, 200, 289]]), passages=1, **generous, **fields)
    result = searcher.search(request)
    exclusion = Exclusion.of(request, store)
    assert exclusion is not None
    expected = twin(np.asarray(store.keys), np.asarray(request.queries, np.float32), 5, exclusion)
    assert result.neighbors.ids is not None
    np.testing.assert_array_equal(result.neighbors.ids, expected[1])
    np.testing.assert_allclose(result.neighbors.distances, expected[0], rtol=1e-5, atol=1e-5)
    found = expected[1] >= 0
    np.testing.assert_array_equal(result.neighbors.values[found], store.values[expected[1][found]])
    assert (result.neighbors.values[~found] == -1).all()
    assert [[p.entry for p in row] for row in result.passages] == [row[row >= 0][:1].tolist() for row in expected[1]]


@pytest.mark.parametrize("recipe", ["flat", "ivf8,sq8"])
def test_a_searcher_answers_a_query_alone_as_in_a_batch(tmp_path: Path, recipe: str) -> None:
    path = toy_datastore(tmp_path, key_dtype="float32")
    build_index(path, recipe)
    searcher = Searcher.open(path)
    given = entries(3, -1, 200, 289)
    for own in (False, True):
        request = asked(k=50, exclude_entries=given, exclude_own_documents=own)
        together = searcher.search(request).neighbors
        for row in range(4):
            one = replace(request, queries=request.queries[row : row + 1], exclude_entries=given[row : row + 1])
            alone = searcher.search(one).neighbors
            assert together.ids is not None
            assert alone.ids is not None
            np.testing.assert_array_equal(together.ids[row], alone.ids[0])
            np.testing.assert_array_equal(together.distances[row], alone.distances[0])
        unexcluded = searcher.search(asking(request, exclude_entries=None, exclude_own_documents=False)).neighbors
        assert unexcluded.ids is not None
        assert together.ids is not None
        np.testing.assert_array_equal(together.ids[1], unexcluded.ids[1])


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED)
def test_a_searcher_refuses_what_cannot_be_excluded(
    path: Path, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        Searcher.open(path).search(asked(**fields))
    assert refused.value.param == param
