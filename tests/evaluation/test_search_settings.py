"""How to search: measured beside exact search, and chosen by a rule that is told."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.datastore.reader import Datastore
from knnlm.errors import InvalidRequest
from knnlm.evaluation.collect import HeldOut, find
from knnlm.evaluation.search_settings import EXACT, QUALITIES, SPEED_TOLERANCE, Tuned, choose, settings, tune_searcher
from knnlm.evaluation.timing import Rate
from knnlm.evaluation.tuning import fit, mean_loss
from knnlm.index.build import build_index
from knnlm.index.contract import Index
from knnlm.index.exact import exact_neighbors
from knnlm.index.searcher import Searcher
from knnlm.options import SearchOptions
from knnlm.tuning_records import SearchQuality
from tests.index.helpers import datastore

ENTRIES, DIM, QUERIES = 6000, 32, 1000
KS = [32, 200]


def outlying_keys() -> npt.NDArray[np.float32]:
    """Keys three of whose dimensions vary twenty times as much as the others, which coarse codes are spent on."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((300, DIM))
    keys = centres[rng.integers(0, 300, ENTRIES)] + 0.3 * rng.standard_normal((ENTRIES, DIM))
    keys[:, :3] *= 20
    return keys.astype(np.float32)


def queries_of(path: Path) -> HeldOut:
    """Queries beside keys, whose token is mostly the value of one of the eight nearest: what is missed costs."""
    stored = Datastore.open(path)
    rng = np.random.default_rng(1)
    keys = np.asarray(stored.keys)[rng.integers(0, ENTRIES, QUERIES)]
    queries = (keys + 0.2 * rng.standard_normal((QUERIES, DIM)) * keys.std(axis=0)).astype(np.float32)
    near = exact_neighbors(stored, queries, 8).values[np.arange(QUERIES), rng.integers(0, 8, QUERIES)]
    targets = np.where(rng.random(QUERIES) < 0.9, near, rng.integers(2, 258, QUERIES)).astype(np.int32)
    return HeldOut(queries, np.full(QUERIES, -5.0, np.float32), targets, 2)


@pytest.fixture(scope="module")
def outlying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = datastore(tmp_path_factory.mktemp("outlying") / "store", outlying_keys())
    build_index(path, "ivf64,pq32x4fs")
    return path


@pytest.fixture(scope="module")
def held_out(outlying: Path) -> HeldOut:
    return queries_of(outlying)


def by_effort(programs: Mapping[str, Callable[[], int]]) -> Mapping[str, Rate]:
    """Speeds as they would be on a quiet machine: settings that ask for more are slower."""
    rates = {}
    for name, program in programs.items():
        assert program() > 0
        asked = dict(option.split("=") for option in name.split(",") if "=" in option)
        cost = float(asked.get("nprobe", 64)) / 64 + float(asked.get("overfetch", 1))
        rates[name] = Rate((1000 / cost,))
    return rates


def tuned(path: Path, held_out: HeldOut, quality: str = "balanced", exact_queries: int = 4096) -> Tuned:
    searcher = Searcher.open(path)
    return tune_searcher(
        searcher, held_out, "float32", ks=KS, quality=quality, exact_queries=exact_queries, timing=by_effort
    )


@pytest.fixture(scope="module")
def by_quality(outlying: Path, held_out: HeldOut) -> dict[str, Tuned]:
    return {quality: tuned(outlying, held_out, quality) for quality in QUALITIES}


def rows(found: Tuned) -> dict[str, SearchQuality]:
    return {row.name: row for row in found.fit.tuning.quality}


@pytest.mark.parametrize("quality", QUALITIES)
def test_a_poor_default_gives_way_to_the_cheapest_setting_that_is_near_enough(
    by_quality: dict[str, Tuned], quality: str
) -> None:
    found = by_quality[quality]
    table = rows(found)
    limit = table[EXACT].perplexity * (1 + QUALITIES[quality])
    assert table["default"].perplexity > 1.02 * limit
    (chosen,) = [row for row in table.values() if row.chosen]
    assert chosen.perplexity <= limit
    assert chosen.queries_per_second is not None
    least = chosen.queries_per_second / (1 - SPEED_TOLERANCE)
    cheaper = [row for row in table.values() if row.queries_per_second is not None and row.queries_per_second > least]
    assert cheaper
    assert all(row.perplexity > limit for row in cheaper)
    assert found.near
    assert found.fit.tuning.search == chosen.search
    assert found.fit.tuning.index == "ivf64,pq32x4fs"


def test_the_nearer_to_exact_search_the_slower(by_quality: dict[str, Tuned]) -> None:
    chosen = [row for found in by_quality.values() for row in found.fit.tuning.quality if row.chosen]
    perplexities = [row.perplexity for row in chosen]
    speeds = [row.queries_per_second or 0 for row in chosen]
    assert perplexities == sorted(perplexities)
    assert speeds == sorted(speeds)
    assert len(set(speeds)) == 3


def test_an_index_that_comes_near_in_no_way_says_so(tmp_path: Path) -> None:
    path = datastore(tmp_path / "store", outlying_keys())
    build_index(path, "ivf64,pq4x4fs")
    found = tuned(path, queries_of(path))
    table = rows(found)
    (chosen,) = [row for row in table.values() if row.chosen]
    assert not found.near
    assert chosen.perplexity == min(row.perplexity for name, row in table.items() if name != EXACT)
    assert chosen.perplexity > table[EXACT].perplexity * (1 + QUALITIES["balanced"])


def test_exact_search_in_the_table_is_brute_force(
    outlying: Path, held_out: HeldOut, by_quality: dict[str, Tuned]
) -> None:
    found = by_quality["balanced"]
    keys = np.asarray(Datastore.open(outlying).keys, np.float64)
    squared = np.stack([((keys - query) ** 2).sum(axis=1) for query in held_out.queries.astype(np.float64)])
    order = np.argsort(squared, axis=1)[:, : found.fit.tuning.k]
    values = Datastore.open(outlying).values[order]
    tuning = found.fit.tuning
    near = np.take_along_axis(squared, order, axis=1)
    temperatures = np.geomspace(tuning.temperature / 8, tuning.temperature * 8, 60)
    best = min(perplexities(near, values, held_out, float(t), np.linspace(0.5, 0.99, 50)).min() for t in temperatures)
    assert rows(found)[EXACT].perplexity == pytest.approx(best, rel=3e-3)
    assert rows(found)[EXACT].perplexity <= best * (1 + 1e-6)


def perplexities(
    distances: npt.NDArray[np.float64],
    values: npt.NDArray[np.int32],
    held_out: HeldOut,
    t: float,
    lambdas: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """One for each lambda."""
    weights = np.exp(-(distances - distances.min(axis=1, keepdims=True)) / t)
    p_knn = (weights * (values == held_out.targets[:, None])).sum(axis=1) / weights.sum(axis=1)
    p_lm = np.exp(held_out.lm_log_probs.astype(np.float64))
    p = (1 - lambdas[:, None]) * p_lm + lambdas[:, None] * p_knn  # (lambdas, n)
    found: npt.NDArray[np.float64] = np.exp(-np.log(p).mean(axis=1))
    return found


def test_temperature_and_lambda_are_those_of_what_is_served(outlying: Path, held_out: HeldOut) -> None:
    """Fitted to what a request that names the domain alone is answered, on all tokens."""
    found = tuned(outlying, held_out, exact_queries=100)
    tuning = found.fit.tuning
    served = find(Searcher.open(outlying), "toy", held_out, replace(tuning.search, k=tuning.k))
    assert tuning.knn_perplexity == pytest.approx(np.exp(mean_loss(served, tuning.temperature, tuning.lmbda)))
    assert (tuning.temperature, tuning.lmbda) == (fit(served).tuning.temperature, fit(served).tuning.lmbda)
    assert tuning.tokens == QUERIES
    assert {point.k for point in found.fit.curve} == set(KS)


def test_the_leak_canary_sees_true_distances_however_the_domain_is_searched(outlying: Path) -> None:
    stored = Datastore.open(outlying)
    rows = np.arange(0, ENTRIES, 40)
    targets = np.full(len(rows), 2, np.int32)  # tokens that neighbors do not help with: the cheapest search is taken
    copies = HeldOut(np.asarray(stored.keys)[rows], np.full(len(rows), -1.0, np.float32), targets, 1)
    found = tune_searcher(Searcher.open(outlying), copies, "float32", ks=[8], quality="fast", timing=without_rescoring)
    assert found.fit.tuning.search.rescore is False
    assert found.leak == 1.0


def without_rescoring(programs: Mapping[str, Callable[[], int]]) -> Mapping[str, Rate]:
    return {name: Rate((2.0 if name == "rescore=false" else 1.0,)) for name in programs}


def test_without_exact_queries_the_index_is_taken_as_it_is(outlying: Path, held_out: HeldOut) -> None:
    found = tuned(outlying, held_out, exact_queries=0)
    assert (found.fit.tuning.search, found.fit.tuning.quality, found.near) == (SearchOptions(), (), True)
    both = [find(Searcher.open(outlying), "toy", held_out, SearchOptions(k=k)) for k in KS]
    points = [point for observed in both for point in fit(observed).curve]
    assert sorted(found.fit.curve, key=repr) == sorted(points, key=repr)


def test_exact_indexes_have_nothing_to_choose(outlying: Path, held_out: HeldOut) -> None:
    searcher = Searcher.open(outlying, index="flat")
    found = tune_searcher(searcher, held_out, "float32", ks=KS).fit.tuning
    assert (found.search, found.quality, found.index) == (SearchOptions(), (), "flat")


@dataclass
class Defaults(Index):
    """An index with these defaults, that is never searched."""

    efforts: Mapping[str, int] = field(default_factory=dict)
    overfetch: float = 1.0
    reduced: npt.NDArray[np.float16] | None = None
    rescored: int | None = None

    def search(
        self, queries: object, k: int, options: object = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        raise NotImplementedError

    @property
    def memory_bytes(self) -> int:
        return 0


def names(index: Index) -> list[list[str]]:
    return [list(ladder.steps) for ladder in settings(index)]


def test_settings_follow_the_defaults_of_the_index() -> None:
    lists = settings(Defaults({"nprobe": 24}, overfetch=1.25))
    assert next(iter(lists[0].steps.items())) == ("default", SearchOptions())
    assert [ladder.costlier for ladder in lists] == [False, False, True, True, False]
    options = {name: chosen for ladder in lists for name, chosen in ladder.steps.items()}
    assert options["nprobe=48,overfetch=2.5"] == SearchOptions(nprobe=48, overfetch=2.5)
    assert options["nprobe=12"] == SearchOptions(nprobe=12)
    assert options["rescore=false"] == SearchOptions(rescore=False)
    assert not any(chosen.rescore for chosen in options.values())
    graph = settings(Defaults({"ef_search": 64}, reduced=np.zeros((1, 1), np.float16)))
    options = {name: chosen for ladder in graph for name, chosen in ladder.steps.items()}
    assert options["ef_search=256"] == SearchOptions(ef_search=256)
    assert options["rescore=true,overfetch=2"] == SearchOptions(rescore=True, overfetch=2.0)
    assert [steps[0] for steps in names(Defaults())] == ["default", "rescore=false"]
    assert [steps[0] for steps in names(Defaults(rescored=256))] == ["default", "rescore=true", "rescore=false"]
    assert names(Defaults(rescored=256))[1] == ["rescore=true"]  # more candidates of all are the default's steps


def row(name: str, perplexity: float, speed: float) -> SearchQuality:
    return SearchQuality(name, SearchOptions(), perplexity, speed)


def test_the_fastest_that_is_near_enough_is_chosen_and_noise_decides_nothing() -> None:
    near, nearer, fast = row("near", 10.02, 100.0), row("nearer", 10.01, 97.0), row("fast", 10.08, 900.0)
    assert choose([near, fast], 10.03) == near
    assert choose([near, nearer, fast], 10.03) == nearer  # about as fast
    assert choose([near, nearer, fast], 10.1) == fast
    assert choose([near, nearer, fast], 10.001) == nearer  # none is near enough: the nearest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": "best"}, "quality must be one of exact, balanced, fast, got 'best'"),
        ({"ks": [8, 0]}, "k must be at least 1, got 0"),
        ({"rule": "none"}, "unknown rule 'none'; known: fixed"),
        ({"exact_queries": -1}, "exact_queries must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    outlying: Path, held_out: HeldOut, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        tune_searcher(Searcher.open(outlying), held_out, "float32", **options)  # type: ignore[arg-type]


def test_progress_is_told_for_every_step(outlying: Path, held_out: HeldOut) -> None:
    steps: list[tuple[str, int, int]] = []
    searcher = Searcher.open(outlying)
    tune_searcher(searcher, held_out, "float32", ks=[8], timing=by_effort, on_progress=lambda *step: steps.append(step))
    assert steps[0] == (EXACT, ENTRIES, ENTRIES)
    assert {"searching, default", "measuring speed", "searching, k 8"} <= {what for what, _, _ in steps}
    assert all(0 <= done <= total for _, done, total in steps)
