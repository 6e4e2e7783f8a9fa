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
from knnlm.datastore.updates.revise import with_index
from knnlm.lm.model import LanguageModel
from knnlm.messages import ForwardRequest, ForwardResult
from knnlm.options import DomainOptions, KnnOptions
from knnlm.pipeline import Pipeline
from tests.cli.conftest import Knnlm


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
    assert knnlm("verify", "--all", "--json").json == [
        {"domain": "toy", "version": "v1", "problems": [], "remarks": []}
    ]
    keys = store / "toy" / "v1" / "keys.npy"
    data = bytearray(keys.read_bytes())
    data[-1] ^= 1
    keys.write_bytes(data)
    answer = knnlm("verify", "toy", "--json")
    assert answer.code == 1
    assert "keys.npy has sha256" in json.loads(answer.out)[0]["problems"][0]
    assert answer.err == "error: toy v1 cannot be relied on: see what was found\n"
    assert "keys.npy  has sha256" in knnlm("verify", "toy").out


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
        assert t["p"] == pytest.approx((1 - used["lambda"]) * t["p_lm"] + used["lambda"] * t["p_knn"], rel=1e-6)
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
