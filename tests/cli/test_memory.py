"""`knnlm memory`: what each command prints and writes, over the tiny model and store of the other commands."""

from pathlib import Path

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
