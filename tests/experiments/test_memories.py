"""Memories of the experiments beside a base: weights fitted on one part, mixed on another; each is made once."""

import numpy as np
import pytest

from experiments import memories
from experiments.lab import BASE, Lab, Learner
from experiments.memories import Memory, beside, folder, share
from knnlm.evaluation.splits import Part
from knnlm.memory.manifest import MemoryManifest


def test_every_memory_has_a_name_of_its_own() -> None:
    every = [
        Memory("a"), Memory("b"), Memory("a", beta=0.0), Memory("a", beta=1.0), Memory("a", teacher=Learner("b")),
        Memory("a", layers=1, width=64), Memory("a", layers=2, width=64), Memory("a", mlp=True),
    ]  # fmt: skip
    assert len({memory.name for memory in every}) == len(every)


def test_a_memory_is_mixed_at_the_weight_that_was_best_on_other_documents(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = lab.texts.main.name
    found = beside(lab, Memory(corpus))
    made = MemoryManifest.open(folder(lab, Memory(corpus)))
    assert (made.beta, made.kind, made.start.model_id) == (0.5, "decoder", lab.base.name)
    assert made.targets is not None
    assert made.targets.settings.exclude == "document"
    lm = [lab.held(BASE, corpus, part).lm_log_probs.astype(np.float64) for part in (Part.TUNE, Part.REPORT)]

    def tuned(weight: float) -> float:
        return float(np.logaddexp(np.log1p(-weight) + lm[0], np.log(weight) + found.tune).mean())

    grid = np.linspace(0.01, 0.98, 98)
    assert tuned(max(found.weight, 1e-6)) >= max(map(tuned, grid)) - 1e-6
    p = (1 - found.weight) * np.exp(lm[1]) + found.weight * np.exp(found.report)
    np.testing.assert_allclose(found.mixed, np.log(p), rtol=1e-9)
    monkeypatch.setattr(memories, "train_memory", None)  # what is there is not trained again
    np.testing.assert_array_equal(beside(lab, Memory(corpus)).mixed, found.mixed)


def test_the_recovered_share_is_of_the_gain_of_retrieval() -> None:
    lm = np.array([-3.0, -2.0])
    assert share(lm, lm + 0.5, lm + 0.2) == pytest.approx(0.4)
    assert share(lm, lm + 0.5, lm - 0.1) == pytest.approx(-0.2)
    assert share(lm, lm, lm + 0.1) is None
