"""`knnlm tune` and `knnlm eval` from start to end, over a real store and a tiny model."""

from pathlib import Path

import pytest

from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore
from knnlm.evaluation import cache_fit
from knnlm.lm.model import LanguageModel
from knnlm.rules import RULES
from knnlm.tuning_records import RuleQuality
from knnlm.wire.jsonable import to_json
from tests.cli.conftest import Knnlm
from tests.toys import LEVEL, level

__all__ = ["level"]  # a fixture


def manifest(store: Path, version: str = "v1") -> Manifest:
    return Manifest.load(store / "toy" / version)


def test_eval_and_tune_search_with_the_index_that_is_named(knnlm: Knnlm, store: Path, corpus: Path) -> None:
    knnlm("index", "build", "toy", "--recipe", "ivf4", "--beside")
    for command in (("eval", corpus, "--domain", "toy"), ("tune", "toy", corpus)):
        missing = knnlm(*command, "--index", "ivf9")
        assert (missing.code, "has no index 'ivf9'" in missing.err) == (2, True)
    assert knnlm("eval", corpus, "--domain", "toy", "--index", "ivf4", "--json").json["domains"]
    tuned = knnlm("tune", "toy", corpus, "--part", "tune", "--index", "ivf4", "--k", 8)
    assert "fitted to neighbors found by ivf4; flat answers: `knnlm index use toy ivf4`" in tuned.err
    assert "--index means nothing without --domain" in knnlm("eval", corpus, "--index", "ivf4").err


def test_tune_stores_what_it_found(knnlm: Knnlm, store: Path, corpus: Path, tmp_path: Path) -> None:
    page = tmp_path / "tuning.html"
    found = knnlm("tune", "toy", corpus, "--part", "tune", "--k", 4, "--k", 64, "--page", page, "--json").json
    assert found["knn_perplexity"] < found["lm_perplexity"]
    assert {point["k"] for point in found["curve"]} == {4, 64}
    stored = manifest(store).tuning
    assert stored is not None
    assert (stored.temperature, stored.lmbda, stored.k) == (found["temperature"], found["lambda"], found["k"])
    assert "<svg" in page.read_text()
    assert "perplexity" in knnlm("tune", "toy", corpus, "--part", "tune").out


def test_tune_fits_every_k_to_what_a_request_with_that_k_gets(knnlm: Knnlm, store: Path, corpus: Path) -> None:
    """Not to the first of more candidates, which this index finds better."""
    knnlm("index", "build", "toy", "--recipe", "pq4x4fs")
    command = ("tune", "toy", corpus, "--part", "tune", "--exact-queries", 0, "--json")
    both = [p for p in knnlm(*command, "--k", 8, "--k", 512).json["curve"] if p["k"] == 8]
    alone = knnlm(*command, "--k", 8).json
    assert both == alone["curve"]
    served = knnlm("eval", corpus, "--part", "tune", "--domain", "toy", "--json").json
    assert served["knn"]["perplexity"] == pytest.approx(alone["knn_perplexity"], rel=1e-6)


def test_tune_chooses_how_to_search_and_requests_follow_it(knnlm: Knnlm, store: Path, corpus: Path) -> None:
    knnlm("index", "build", "toy", "--recipe", "pq4x4fs")
    command = ("tune", "toy", corpus, "--part", "tune", "--k", 8)
    found = knnlm(*command, "--json").json
    exact, *ways = found["quality"]
    assert (exact["name"], exact["queries_per_second"]) == ("exact search", None)
    (chosen,) = [row for row in ways if row["chosen"]]
    assert all(row["queries_per_second"] > 0 for row in ways)
    stored = manifest(store).tuning
    assert stored is not None
    tuning = stored.message()
    assert (tuning.index, len(tuning.quality)) == ("pq4x4fs", len(ways) + 1)
    assert {name: value for name, value in chosen["search"].items() if value} == tuning.search.asked()
    served = knnlm("eval", corpus, "--part", "tune", "--domain", "toy", "--json").json
    assert served["knn"]["perplexity"] == pytest.approx(found["knn_perplexity"], rel=1e-6)
    table = knnlm(*command).out
    assert "beside exact" in table
    assert "exact search" in table
    own = knnlm(*command, "--exact-queries", 0, "--json").json
    assert (own["quality"], manifest(store).tuning.message().search.asked()) == ([], {})  # type: ignore[union-attr]
    wrong = knnlm(*command, "--quality", "best")
    assert (wrong.code, "quality must be one of exact, balanced, fast" in wrong.err) == (2, True)


def test_a_rule_is_fitted_stored_and_served(knnlm: Knnlm, store: Path, corpus: Path, level: None) -> None:
    """One class and one row: it looks at the model's entropy and the nearest distance."""
    found = knnlm("tune", "toy", corpus, "--part", "tune", "--k", 8, "--rule", LEVEL, "--json").json
    assert found["rule"] == LEVEL
    assert found["parameters"]["most"] == 0.5
    assert found["parameters"]["scale"] > 0
    served = ("eval", corpus, "--part", "tune", "--domain", "toy")
    assert knnlm(*served, "--json").json["knn"]["perplexity"] == pytest.approx(found["knn_perplexity"], rel=1e-6)
    other = knnlm(*served, "--rule", "fixed", "--json").json["knn"]["perplexity"]
    assert other == pytest.approx(knnlm(*served, "--lambda", found["lambda"], "--json").json["knn"]["perplexity"])
    assert other != pytest.approx(found["knn_perplexity"], rel=1e-6)
    assert "rule level (most 0.5, scale " in knnlm(*served).out
    assert "rule level (most 0.5, scale " in " ".join(knnlm("show", "toy").out.split())
    assert "rule level (most 0.5, scale " in knnlm("next", "the cat", "--domain", "toy").out
    for command in (("tune", "toy", corpus), ("score", "the cat", "--domain", "toy")):
        unknown = knnlm(*command, "--rule", "none")
        assert (unknown.code, "unknown rule 'none'; known: fixed, bins, relative" in unknown.err) == (2, True)


def test_rules_are_compared_and_one_is_chosen_stored_and_served(knnlm: Knnlm, store: Path, corpus: Path) -> None:
    command = ("tune", "toy", corpus, "--part", "tune", "--k", 8, "--rule", "auto")
    found = knnlm(*command, "--json").json
    assert [row["name"] for row in found["rules"]] == list(RULES)
    assert [row["name"] for row in found["rules"] if row["chosen"]] == [found["rule"]]
    stored = manifest(store).tuning
    assert stored is not None
    assert [to_json(row) for row in stored.message().rules] == found["rules"]
    table = knnlm(*command).out
    assert "95 % interval" in table
    assert "gate_lm" in table
    served = knnlm("eval", corpus, "--part", "tune", "--domain", "toy", "--json").json
    assert served["knn"]["perplexity"] == pytest.approx(found["knn_perplexity"], rel=1e-6)


def test_a_gate_that_decides_first_is_fitted_to_leave_out_searches(knnlm: Knnlm, store: Path, corpus: Path) -> None:
    command = ("tune", "toy", corpus, "--part", "tune", "--k", 8, "--rule")
    found = knnlm(*command, "gate_lm", "--skip", 0.5, "--json").json
    assert len(found["parameters"]["gain"]) == 6 + 32  # what is known of the distribution, and the key
    served = knnlm("eval", corpus, "--part", "tune", "--domain", "toy", "--json").json
    assert served["knn"]["perplexity"] == pytest.approx(found["knn_perplexity"], rel=1e-6)
    wrong = knnlm(*command, "gate", "--skip", 0.5)
    assert (wrong.code, "decides before the search (gate_lm), got gate" in wrong.err) == (
        2,
        True,
    )
    wrong = knnlm(*command, "gate_lm", "--skip", 1)
    assert (wrong.code, "skip must lie in [0, 1), got 1" in wrong.err) == (2, True)


def test_the_cache_is_fitted_beside_retrieval_stored_and_served(knnlm: Knnlm, store: Path, corpus: Path) -> None:
    command = ("tune", "toy", corpus, "--part", "tune", "--k", 8, "--cache")
    found = knnlm(*command, "--json").json
    fitted = found["cache_fit"]
    assert found["cache"] == {name: fitted[name] for name in ("lambda", "theta", "size", "knn_lambda")}
    assert fitted["gates"] == {}
    served = ("eval", corpus, "--part", "tune")
    for options, expected in (
        (("--domain", "toy"), fitted["knn_perplexity"]),
        (("--domain", "toy", "--cache"), fitted["both_perplexity"]),
        (("--domain", "toy", "--cache", "--cache-lambda", 0, "--lambda", 0), fitted["lm_perplexity"]),
    ):
        report = knnlm(*served, *options, "--json").json
        assert report["knn"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    table = knnlm(*command).out
    assert "+ kNN + cache" in table
    text = knnlm(*served, "--domain", "toy", "--cache").out
    assert "kNN-LM + cache" in text
    assert "weights on average: toy 0." in text


def test_gates_of_retrieval_and_cache_are_fitted_together_stored_and_served(
    knnlm: Knnlm, store: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [RuleQuality("fixed", 9.0), RuleQuality("gate", 8.0, -0.1, -0.2, -0.1, chosen=True)]
    monkeypatch.setattr(cache_fit, "compare_together", lambda _: rows)  # the documents here are too few to tell
    command = ("tune", "toy", corpus, "--part", "tune", "--k", 8, "--cache")
    found = knnlm(*command, "--json").json
    assert [(row["name"], row["chosen"]) for row in found["cache_fit"]["compared"]] == [
        ("fixed", False), ("gate", True),
    ]  # fmt: skip
    stored = manifest(store).tuning
    assert stored is not None
    assert {name.rpartition(".")[0] for name in stored.cache} == {"", "gate", "knn_gate"}
    report = knnlm("eval", corpus, "--part", "tune", "--domain", "toy", "--cache", "--json").json
    assert report["knn"]["perplexity"] < found["cache_fit"]["both_perplexity"] * (1 + 1e-6)
    assert report["domains"][0]["rule"] == "gate"
    fixed = knnlm("eval", corpus, "--part", "tune", "--domain", "toy", "--cache", "--rule", "fixed", "--json").json
    assert fixed["knn"]["perplexity"] == pytest.approx(found["cache_fit"]["both_perplexity"], rel=1e-5)
    assert "retrieval and cache" in knnlm(*command).out
    assert "gate." not in str(knnlm(*command, "--rule", "bins", "--json").json["cache"])


def test_the_cache_is_fitted_beside_the_model_alone(knnlm: Knnlm, store: Path, corpus: Path) -> None:
    found = knnlm("tune", corpus, "--part", "tune", "--cache", "--json").json
    assert found["cache_perplexity"] <= found["lm_perplexity"]
    options = [part for name in ("lambda", "theta", "size") for part in (f"--cache-{name}", found[name])]
    report = knnlm("eval", corpus, "--part", "tune", *options, "--json").json
    assert report["knn"]["perplexity"] == pytest.approx(found["cache_perplexity"], rel=1e-5)
    assert report["domains"] == []
    assert "cache: lambda" in knnlm("tune", corpus, "--part", "tune", "--cache").out
    assert "LM + cache" in knnlm("eval", corpus, "--part", "tune", *options).out
    for asked, problem in (
        (("tune", corpus, "--cache", "--k", 8), "--k means nothing without a domain"),
        (("tune", "toy"), "expected documents after the domain"),
        (("score", "the cat", "--cache"), "lambda of the cache has not been tuned"),
        (("score", "the cat", "--cache-theta", -1), "theta must lie in"),
    ):
        wrong = knnlm(*asked)
        assert (wrong.code, problem in wrong.err) == (2, True), wrong.err
    assert "p_cache" in knnlm("score", "the cat sat on the cat", *options).out
    assert "p_cache" in knnlm("next", "the cat sat on the", *options).out
    assert knnlm("generate", "the cat sat on the", *options, "--max-tokens", 3).code == 0
    assert knnlm("explain", "the cat sat on the cat", *options).code == 0


def test_an_empty_domain_cannot_be_tuned(
    knnlm: Knnlm, store: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = [row.id for _, row in Datastore.open(store / "toy" / "v1").live_rows()]
    assert knnlm("forget", "toy", *stored).code == 0
    monkeypatch.setattr(LanguageModel, "load", None)  # it is refused before the model is loaded
    answer = knnlm("tune", "toy", corpus)
    assert answer.code == 2
    assert "toy v2 has no entries, so there is nothing to tune: add documents first" in answer.err


def test_tune_leaves_out_what_is_stored(knnlm: Knnlm, store: Path, corpus: Path) -> None:
    answer = knnlm("tune", "toy", corpus, "--part", "store")
    assert answer.code == 2
    assert "no document to fit on: 30 of 30 are in " in answer.err
    mixed = knnlm("tune", "toy", corpus, "--json")
    assert "30 of 40 documents are in the datastore and left out" in mixed.err
    assert mixed.json["documents"] == 10


def test_eval_compares_the_model_with_and_without_neighbors(knnlm: Knnlm, store: Path, corpus: Path) -> None:
    command = ("eval", corpus, "--part", "report", "--domain", "toy")
    report = knnlm(*command, "--json").json
    assert report["knn"]["perplexity"] < report["lm"]["perplexity"]
    assert report["warnings"] == []
    assert (report["context_length"], report["min_context"]) == (64, 32)
    answer = knnlm(*command, "--per-document", "--max-tokens", 100)
    assert "kNN-LM" in answer.out
    assert "100 tokens of" in answer.out
    assert "windows of 64 tokens, at least 32 of context" in answer.out
    alone = knnlm("eval", corpus, "--part", "report", "--json").json
    assert alone["knn"] is None
    assert alone["lm"] == report["lm"]


def test_tune_and_eval_take_the_windows_of_the_domain_unless_others_are_asked_for(
    knnlm: Knnlm, store: Path, corpus: Path
) -> None:
    knnlm("build", "toy", corpus, "--part", "store", "--context-length", 16, "--min-context", 12)
    tune = ("tune", "toy", corpus, "--part", "tune", "--k", 8, "--json")
    tuned = knnlm(*tune).json
    same = knnlm(*tune, "--context-length", 16, "--min-context", 12).json
    other = knnlm(*tune, "--context-length", 64).json
    assert tuned["lm_perplexity"] == same["lm_perplexity"] != other["lm_perplexity"]
    stored = ("eval", corpus, "--part", "store", "--domain", "toy", "--json")
    report = knnlm(*stored).json
    assert (report["context_length"], report["min_context"], report["leaks"]["toy"]) == (16, 12, 1.0)
    report = knnlm(*stored, "--context-length", 32).json
    assert (report["context_length"], report["min_context"]) == (32, 16)
    assert report["leaks"]["toy"] < 1
    answer = knnlm("score", "the cat", "--domain", "toy", "--context-length", 65)
    assert (answer.code, "context_length must lie in [2, 64], got 65" in answer.err) == (2, True)


def test_eval_warns_when_the_text_is_in_the_datastore(knnlm: Knnlm, store: Path, corpus: Path) -> None:
    answer = knnlm("eval", corpus, "--part", "store", "--domain", "toy", "--max-tokens", 200)
    assert answer.code == 0
    assert "warning: " in answer.err
    assert "probably in the datastore" in answer.err
