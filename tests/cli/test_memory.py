"""`knnlm memory`: what each command prints and writes, over the tiny model and store of the other commands."""

from pathlib import Path

import pytest

from knnlm.datastore.reader import Datastore
from knnlm.memory.targets import Targets
from tests.cli.conftest import Knnlm


def test_targets_are_fitted_made_and_described(knnlm: Knnlm, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "t"
    answer = knnlm("memory", "targets", "toy", "--out", out, "--k", 4, "--k", 16, "--top", 8, "--json").json
    made = Targets.open(out, check="all").manifest
    assert answer["path"] == str(out)
    assert answer["settings"]["k"] == made.settings.k
    assert made.settings.k in (4, 16)
    assert made.fit is not None
    assert answer["fit"]["lm_perplexity"] == made.fit.lm_perplexity
    assert 0 < made.fit.knn_perplexity <= made.fit.lm_perplexity
    assert made.rows == len(Targets.open(out))
    again = knnlm("memory", "targets", "toy", "--out", out)
    assert again.code == 1
    assert "exists already" in again.err


def test_targets_with_a_given_temperature_need_no_fit(knnlm: Knnlm, store: Path, tmp_path: Path) -> None:
    answer = knnlm("memory", "targets", "toy", "--out", tmp_path / "t", "--k", 8, "--temperature", 5)
    assert answer.code == 0
    assert "k 8, temperature 5, excluded: entry" in answer.out
    refused = knnlm("memory", "targets", "toy", "--out", tmp_path / "u", "--temperature", 5)
    assert (refused.code, "belongs to one k" in refused.err) == (2, True)


def test_a_memory_is_trained_shown_verified_and_goes_stale(
    knnlm: Knnlm, store: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert knnlm("memory", "targets", "toy", "--k", 8, "--temperature", 5).code == 0
    common = ("memory", "train", "toy", corpus, "--part", "tune", "--epochs", 2, "--batch-entries", 500)
    made = knnlm(*common, "--json").json
    assert (made["path"], made["kind"], made["tune"]["documents"]) == ("memories/toy", "decoder", 6)
    assert made["targets"]["settings"]["temperature"] == 5
    assert made["training"]["evaluate_steps"] == 1
    assert knnlm("memory", "show", "memories/toy", "--json").json == {**made, "stale": None}
    shown = knnlm("memory", "show", "memories/toy")
    assert "toy v1" in shown.out
    assert "p_kNN (k 8, temperature 5, without its own entry) and the text, beta 0.5" in shown.out
    assert shown.err == ""
    targets = knnlm("memory", "show", "memories/toy-v1.targets")
    assert "k 8, temperature 5, excluded: entry" in targets.out
    assert knnlm("memory", "show", "memories/toy-v1.targets", "--json").json["stale"] is None
    for name in ("toy", "toy-v1.targets"):
        assert "as they were written" in knnlm("memory", "verify", f"memories/{name}").out
    stored = next(row.id for _, row in Datastore.open(store / "toy/v1").live_rows())
    forgotten = knnlm("forget", "toy", stored)
    assert "a memory trained on toy has not unlearnt them" in forgotten.err
    stale = knnlm("memory", "show", "memories/toy")
    assert "warning: stale: made from toy v1" in stale.err
    weights = Path("memories/toy/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert (damaged := knnlm("memory", "verify", "memories/toy")).code == 1
    assert "model.safetensors has sha256" in damaged.err


@pytest.mark.parametrize("kind", ["mlp", "text"])
def test_other_memories_are_trained_by_the_same_command(
    knnlm: Knnlm, store: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    special = {"mlp": ("--kind", "mlp", "--hidden", 16, "--bottleneck", 8), "text": ("--beta", 0)}[kind]
    if kind == "mlp":
        assert knnlm("memory", "targets", "toy", "--k", 8, "--temperature", 5).code == 0
    common = ("memory", "train", "toy", corpus, "--part", "tune", "--epochs", 1, "--batch-entries", 500)
    made = knnlm(*common, *special, "--json").json
    assert made["start"]["sizes"] == ({"hidden": 16, "layers": 2, "bottleneck": 8} if kind == "mlp" else {})
    assert (made["targets"] is None) == (kind == "text")


def test_wrong_numbers_are_refused_with_the_exit_code_of_wrong_usage(
    knnlm: Knnlm, store: Path, corpus: Path, tmp_path: Path
) -> None:
    for wrong in (("--epochs", 0), ("--beta", 2), ("--evaluations", 0), ("--kind", "x"), ("--learning-rate", -1)):
        answer = knnlm("memory", "train", "toy", corpus, "--out", tmp_path / "m", *wrong)
        assert (answer.code, answer.err.startswith("error: ")) == (2, True), answer.err
