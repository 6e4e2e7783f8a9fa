"""Every command from start to end, over a real store and a tiny model."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnlm.cli.index import print_index
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.manifest import IndexRecord, Manifest
from knnlm.datastore.reader import Datastore
from knnlm.datastore.updates.revise import with_index
from knnlm.lm.model import LanguageModel
from knnlm.messages import ForwardRequest, ForwardResult
from knnlm.options import DomainOptions, KnnOptions
from knnlm.pipeline import Pipeline
from tests.cli.conftest import Knnlm
from tests.toys import LEVEL, level

__all__ = ["level"]  # a fixture


def manifest(store: Path, version: str = "v1") -> Manifest:
    return Manifest.load(store / "toy" / version)


def test_build_says_what_it_made_and_activates_it(knnlm: Knnlm, store: Path, corpus: Path) -> None:
    answer = knnlm("build", "toy", corpus, "--part", "store")
    assert answer.code == 0
    assert "entries of 30 documents" in answer.out
    assert "index flat: " in answer.out
    assert "v2 is now the current version of toy" in answer.out
    assert Catalog(store).current("toy") == "v2"


def test_build_without_activation_says_how_to_do_it(knnlm: Knnlm, store: Path, corpus: Path) -> None:
    answer = knnlm("build", "toy", corpus, "--no-activate", "--index", "none", "--version", "next")
    assert "not activated: `knnlm domains activate toy next`" in answer.out
    assert Catalog(store).current("toy") == "v1"


def test_build_as_json(knnlm: Knnlm, store: Path, corpus: Path) -> None:
    made = knnlm("build", "toy", corpus, "--key-dtype", "float32", "--index", "ivf4,flat", "--json").json
    assert made["version"] == "v2"
    assert made["index"] == "ivf4,flat"
    assert made["documents"] == 40
    assert manifest(store, "v2").key_dtype == "float32"


def test_build_of_no_document_is_refused_before_the_model_is_loaded(knnlm: Knnlm, store: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    answer = knnlm("build", "new", tmp_path / "empty.jsonl", "--model", tmp_path / "no such model")
    assert (answer.code, answer.out) == (2, "")
    assert "no document with a token to predict" in answer.err
    assert not (store / "new").exists()


def test_build_that_was_stopped_says_how_to_continue_and_continues(
    knnlm: Knnlm, store: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LanguageModel.forward
    calls = 0

    def stopped(self: LanguageModel, request: ForwardRequest) -> ForwardResult:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return forward(self, request)

    monkeypatch.setattr(LanguageModel, "forward", stopped)
    command = ("build", "toy", corpus, "--batch-tokens", "256")
    answer = knnlm(*command)
    assert answer.code == 130
    assert "the same command continues" in answer.err
    assert Catalog(store).versions("toy") == ["v1"]
    assert knnlm(*command, "--json").json["version"] == "v2"
    assert knnlm("verify", "toy").code == 0


def test_build_whose_index_fails_says_how_to_finish(knnlm: Knnlm, store: Path, corpus: Path) -> None:
    answer = knnlm("build", "toy", corpus, "--index", "ivf4,pq31")
    assert answer.code == 2
    assert "continue with `knnlm index build toy --version v2` and `knnlm domains activate toy v2`" in answer.err
    assert answer.err.splitlines()[-1].startswith("error: index ivf4,pq31 does not suit")
    assert Catalog(store).current("toy") == "v1"
    assert knnlm("index", "build", "toy", "--version", "v2").code == 0


def test_index_rebuilds_and_says_when_to_tune_again(knnlm: Knnlm, store: Path) -> None:
    assert manifest(store).tuning is not None
    answer = knnlm("index", "build", "toy", "--recipe", "ivf4,sq8")
    assert answer.code == 0
    assert "index ivf4,sq8 of toy v1: as asked" in answer.out
    assert "fitted to neighbors found by flat: run `knnlm tune toy` again" in answer.err
    again = knnlm("index", "build", "toy", "--recipe", "ivf4,sq8", "--json")
    assert (again.json["index"], again.err) == ("ivf4,sq8", "")


def test_index_gives_way_to_a_smaller_one_and_auto_says_why(knnlm: Knnlm, store: Path) -> None:
    smaller = knnlm("index", "build", "toy", "--recipe", "ivf100000,sq8")
    assert smaller.code == 0
    assert "ivf100000,sq8 was asked for, but 100000 lists need at least as many entries" in smaller.out
    auto = knnlm("index", "build", "toy", "--json").json
    assert (auto["index"], auto["indexes"]) == ("flat", ["flat"])
    assert "exact search" in auto["reasons"][0]
    assert knnlm("index", "build", "toy").out == f"index flat of toy v1: {auto['reasons'][0]}\n"


def test_reasons_stand_below_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    print_index("index x", ["one", "two"])
    assert capsys.readouterr().out == "index x\n  one\n  two\n"


def test_several_indexes_are_built_beside_used_and_removed(knnlm: Knnlm, store: Path) -> None:
    beside = knnlm("index", "build", "toy", "--recipe", "ivf4", "--beside")
    assert beside.out.splitlines()[1] == "flat answers, ivf4 beside it"
    assert beside.err == ""  # the tuning is that of what answers
    assert manifest(store).index.recipe == "flat"
    used = knnlm("index", "use", "toy", "ivf4", "--json")
    assert used.json["indexes"] == ["ivf4", "flat"]
    assert "fitted to neighbors found by flat" in used.err
    assert knnlm("index", "remove", "toy", "ivf4").code == 1
    assert knnlm("index", "remove", "toy", "flat", "--json").json["indexes"] == ["ivf4"]
    missing = knnlm("index", "use", "toy", "ivf9")
    assert (missing.code, "has no index 'ivf9': it has flat, ivf4" in missing.err) == (2, True)


def test_what_is_unusual_about_an_index_is_remarked(knnlm: Knnlm, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knnlm.index.build.index_remark", lambda path, recipe: f"{recipe} of {path.name} is odd")
    answer = knnlm("index", "build", "toy", "--recipe", "ivf4,sq8", "--json")
    assert answer.json["index"] == "ivf4,sq8"
    assert "ivf4,sq8 of v1 is odd" in answer.err


def test_eval_and_tune_search_with_the_index_that_is_named(knnlm: Knnlm, store: Path, corpus: Path) -> None:
    knnlm("index", "build", "toy", "--recipe", "ivf4", "--beside")
    for command in (("eval", corpus, "--domain", "toy"), ("tune", "toy", corpus)):
        missing = knnlm(*command, "--index", "ivf9")
        assert (missing.code, "has no index 'ivf9'" in missing.err) == (2, True)
    assert knnlm("eval", corpus, "--domain", "toy", "--index", "ivf4", "--json").json["domains"]
    tuned = knnlm("tune", "toy", corpus, "--part", "tune", "--index", "ivf4")
    assert "fitted to neighbors found by ivf4; flat answers: `knnlm index use toy ivf4`" in tuned.err
    assert "--index means nothing without --domain" in knnlm("eval", corpus, "--index", "ivf4").err


def test_show_tells_what_a_person_decides_by(knnlm: Knnlm, store: Path) -> None:
    answer = knnlm("show", "toy", "--entry", 0, "--around", 8)
    assert "30 documents" in answer.out
    assert "ffn_input, 32 x float16" in answer.out
    assert "entry 0: token 1 of d0" in answer.out
    shown = knnlm("show", "toy", "--entry", 30, "--json").json
    assert shown["domain"] == "toy"
    entry = shown["shown"][0]
    assert entry["after"].startswith(entry["token"])
    assert entry["document"] == "d0"
    assert entry["position"] == 31


def test_show_and_list_tell_every_index_and_what_it_holds_in_memory(knnlm: Knnlm, store: Path) -> None:
    m = manifest(store)
    flat = 4 * m.entries * m.key_dim
    assert knnlm("show", "toy", "--json").json["memory"] == {"flat": flat}
    assert f"flat, {flat:,} bytes in memory" in knnlm("show", "toy").out
    knnlm("index", "build", "toy", "--recipe", "ivf4,flat")
    with_index(store / "toy" / "v1", IndexRecord(recipe="of-the-future"), {}, beside=True)
    shown = knnlm("show", "toy", "--json").json
    assert shown["memory"] == {"ivf4,flat": 4 * 4 * m.key_dim, "of-the-future": None}  # the first: centroids
    table = knnlm("show", "toy").out
    assert f"ivf4,flat, {4 * 4 * m.key_dim:,} bytes in memory" in table
    assert "of-the-future" in table
    (row,) = knnlm("domains", "list", "--json").json
    assert (row["index"], row["indexes"]) == ("ivf4,flat", ["ivf4,flat", "of-the-future"])
    assert "ivf4,flat; of-the-future" in knnlm("domains", "list").out


def test_verify_passes_and_finds_one_changed_byte(knnlm: Knnlm, store: Path) -> None:
    assert knnlm("verify", "--all", "--json").json == [{"domain": "toy", "version": "v1", "problems": []}]
    keys = store / "toy" / "v1" / "keys.npy"
    data = bytearray(keys.read_bytes())
    data[-1] ^= 1
    keys.write_bytes(data)
    answer = knnlm("verify", "toy", "--json")
    assert answer.code == 1
    assert "keys.npy has sha256" in json.loads(answer.out)[0]["problems"][0]
    assert answer.err == "error: toy v1 cannot be relied on: see what was found\n"
    assert "keys.npy  has sha256" in knnlm("verify", "toy").out


def test_tune_stores_what_it_found(knnlm: Knnlm, store: Path, corpus: Path, tmp_path: Path) -> None:
    page = tmp_path / "tuning.html"
    found = knnlm("tune", "toy", corpus, "--part", "tune", "--k", 4, "--k", 64, "--page", page, "--json").json
    assert found["knn_perplexity"] < found["lm_perplexity"]
    assert {point["k"] for point in found["curve"]} == {4, 64}
    stored = manifest(store).tuning
    assert stored is not None
    assert (stored.temperature, stored.lmbda, stored.k) == (found["temperature"], found["lmbda"], found["k"])
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
    assert other == pytest.approx(knnlm(*served, "--lambda", found["lmbda"], "--json").json["knn"]["perplexity"])
    assert other != pytest.approx(found["knn_perplexity"], rel=1e-6)
    assert "rule level (most 0.5, scale " in knnlm(*served).out
    assert "rule level (most 0.5, scale " in " ".join(knnlm("show", "toy").out.split())
    assert "rule level (most 0.5, scale " in knnlm("next", "the cat", "--domain", "toy").out
    for command in (("tune", "toy", corpus), ("score", "the cat", "--domain", "toy")):
        unknown = knnlm(*command, "--rule", "none")
        assert (unknown.code, "unknown rule 'none'; known: fixed, level" in unknown.err) == (2, True)


def test_next_sees_the_end_of_a_text_that_is_too_long(knnlm: Knnlm, store: Path) -> None:
    text = "the cat sat on the mat. " * 4
    refused = knnlm("next", text)
    assert (refused.code, "the text has 97 tokens, at most 64 are taken: --truncate left keeps" in refused.err) == (
        2,
        True,
    )
    end = knnlm("next", text[-63:], "--json").json["tokens"]
    assert knnlm("next", text, "--truncate", "left", "--json").json["tokens"] == end
    short = knnlm("next", text, "--truncate", "left", "--context-length", 9, "--json").json["tokens"]
    assert short == knnlm("next", text[-8:], "--json").json["tokens"] != end
    assert "--truncate must be left" in knnlm("next", text, "--truncate", "right").err
    assert "context_length must lie in [1, 64], got 65" in knnlm("next", text, "--context-length", 65).err


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
    tuned = knnlm("tune", "toy", corpus, "--part", "tune", "--json").json
    same = knnlm("tune", "toy", corpus, "--part", "tune", "--context-length", 16, "--min-context", 12, "--json").json
    other = knnlm("tune", "toy", corpus, "--part", "tune", "--context-length", 64, "--json").json
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


def test_lambda_zero_is_the_model(knnlm: Knnlm, store: Path, model: Path) -> None:
    mixed = knnlm("score", "the cat sat", "--domain", "toy", "--lambda", 0, "--json").json
    alone = knnlm("score", "the cat sat", "--json").json
    assert mixed["total"] == alone["total"]
    assert [t["token"] for t in alone["tokens"]][:3] == ["t", "h", "e"]
    assert alone["tokens"][0]["knn_log_prob"] is None
    with Pipeline.load(str(model), store) as pipeline:
        expected = pipeline.score("the cat sat", KnnOptions((DomainOptions("toy", lmbda=0.0),))).knn_log_probs
    assert expected is not None
    found = [token["knn_log_prob"] for token in mixed["tokens"]]
    assert found == pytest.approx([None if np.isneginf(p) else p for p in expected])


def test_a_document_that_is_excluded_does_not_count(knnlm: Knnlm, store: Path, corpus: Path) -> None:
    text = json.loads(corpus.read_text().splitlines()[0])["text"]
    command = ("next", text[:40], "--domain", "toy", "--neighbors", 4, "--json")
    assert knnlm(*command).json["neighbors"][0]["document"] == "d0"
    others = knnlm(*command, "--exclude-document", "d0").json["neighbors"]
    assert len(others) == 4
    assert "d0" not in {n["document"] for n in others}
    score = ("score", text[:40], "--domain", "toy", "--json")
    assert knnlm(*score, "--exclude-document", "d0").json["total"] != knnlm(*score).json["total"]
    report = ("eval", corpus, "--domain", "toy", "--max-tokens", 100, "--json")
    assert knnlm(*report, "--exclude-document", "d0").json["knn"] != knnlm(*report).json["knn"]
    answer = knnlm("eval", corpus, "--domain", "toy", "--exclude-document", "nobody")
    assert answer.code == 2
    assert "'nobody', which is no document of toy v1" in answer.err
    for option in (("--exclude-document", "d0"), ("--ef-search", 64)):
        assert knnlm("score", "the cat", *option).err == f"error: {option[0]} means nothing without --domain\n"
    assert "--ef-search" in knnlm("next", "--help").out
    assert "so ef_search means nothing to it" in knnlm(*score, "--ef-search", 64).err


def test_score_reads_standard_input(knnlm: Knnlm, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the [bold]cat[/bold]"))
    answer = knnlm("score", "-", "--domain", "toy")
    assert answer.code == 0
    assert "'['" in answer.out  # text is never taken for markup
    assert "20 tokens, total log-probability" in answer.out


def test_next_shows_probabilities_and_neighbors(knnlm: Knnlm, store: Path) -> None:
    answer: dict[str, Any] = knnlm("next", "the cat", "--domain", "toy", "--top", 3, "--neighbors", 2, "--json").json
    tokens, neighbors = answer["tokens"], answer["neighbors"]
    assert len(tokens) == 3
    assert [t["p"] for t in tokens] == sorted((t["p"] for t in tokens), reverse=True)
    used = answer["domains"][0]
    for t in tokens:
        assert t["p"] == pytest.approx((1 - used["lmbda"]) * t["p_lm"] + used["lmbda"] * t["p_knn"], rel=1e-6)
    assert [n["distance"] for n in neighbors] == sorted(n["distance"] for n in neighbors)
    assert len(neighbors) == 2
    table = knnlm("next", "the cat", "--domain", "toy", "--top", 3, "--neighbors", 2).out
    assert repr(tokens[0]["token"]) in table
    assert "toy v1: lambda" in table
    assert "p_knn" not in knnlm("next", "the cat").out


def test_domains_are_listed_activated_and_removed(knnlm: Knnlm, store: Path, corpus: Path) -> None:
    knnlm("build", "toy", corpus, "--index", "none")
    listed = knnlm("domains", "list", "--json").json
    assert [(row["version"], row["current"], row["tuned"]) for row in listed] == [
        ("v1", False, True),
        ("v2", True, False),
    ]
    assert "current" in knnlm("domains", "list").out
    assert knnlm("domains", "activate", "toy", "v1").out == "toy is now v1 (was v2)\n"
    assert knnlm("domains", "remove", "toy", "v2").out == "removed toy v2\n"
    assert knnlm("domains", "activate", "toy", "v1", "--json").json["previous"] == "v1"
    assert Catalog(store).versions("toy") == ["v1"]


def test_an_empty_store_has_no_domains(knnlm: Knnlm, tmp_path: Path) -> None:
    assert knnlm("domains", "list", "--store", tmp_path / "none").out == f"no domains in {tmp_path / 'none'}\n"
    assert knnlm("verify", "--all", "--store", tmp_path / "none", "--json").json == []


def test_train_writes_a_model_that_the_other_commands_take(knnlm: Knnlm, corpus: Path, tmp_path: Path) -> None:
    big = tmp_path / "big.jsonl"
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    big.write_text(
        "".join(json.dumps({"id": f"{i}/{r['id']}", "text": r["text"]}) + "\n" for i in range(9) for r in rows)
    )
    sizes = ("--vocab-size", 260, "--layers", 1, "--width", 16, "--heads", 2, "--context", 16, "--batch-tokens", 64)
    report = knnlm("train", big, "--out", tmp_path / "lm", "--tokens", 128, *sizes, "--json").json
    assert report["parameters"] > 0
    assert report["documents"] == 360
    assert knnlm("score", "the cat", "--model", tmp_path / "lm", "--json").json["model"] == "lm"
