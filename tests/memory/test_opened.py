"""Memories beside a language model: the same numbers in every form of a question, over one vocabulary."""

import json
from pathlib import Path

import numpy as np
import pytest

from knnlm.errors import DatastoreMismatch, InvalidRequest
from knnlm.evaluation.memory_training import MlpSizes, train_memory
from knnlm.lm.distillation import DistilSettings
from knnlm.lm.model import LanguageModel
from knnlm.memory.opened import DecoderMemory, OpenedMemory, open_memory
from knnlm.messages import ForwardRequest
from tests.lm import tiny_models
from tests.memory.conftest import World

SETTINGS = DistilSettings(steps=2, batch_entries=300)
TOKENS = [np.array([0, 70, 80, 75], np.int32), np.array([0, 90], np.int32)]
POSITIONS = [np.array([1, 3], np.int32), np.array([1], np.int32)]
TARGETS = np.array([80, 66, 70], np.int32)


@pytest.fixture(scope="module", params=["decoder", "wide", "mlp"])
def opened(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> OpenedMemory:
    """wide: with more logits than the language model, as padded vocabularies have."""
    folder = tmp_path_factory.mktemp(request.param)
    start = None
    if request.param == "wide":
        config = json.loads((world.model / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 40}))
        start = str(folder / "config.json")
    kind = "mlp" if request.param == "mlp" else "decoder"
    train_memory(
        world.store, "law", world.held_out, str(world.model), folder / "memory", SETTINGS, kind=kind, start=start,
        targets=world.targets, sizes=MlpSizes(16, 1, 8) if kind == "mlp" else None, device="cpu",
    )  # fmt: skip
    return open_memory(folder / "memory", LanguageModel.load(str(world.model), device="cpu").info, device="cpu")


def test_answers_are_distributions_over_the_vocabulary_of_the_language_model(
    world: World, opened: OpenedMemory
) -> None:
    lm = LanguageModel.load(str(world.model), device="cpu")
    keys = lm.forward(ForwardRequest(TOKENS, POSITIONS, keys=True)).keys
    whole = opened.log_probs(TOKENS, POSITIONS, keys)
    assert whole.shape == (3, lm.info.vocab_size) == (3, opened.vocab_size)
    np.testing.assert_allclose(np.exp(whole.astype(np.float64)).sum(axis=1), 1, atol=1e-5)
    of_targets = opened.log_probs(TOKENS, POSITIONS, keys, TARGETS)
    np.testing.assert_allclose(of_targets, whole[np.arange(3), TARGETS], atol=1e-5)
    if isinstance(opened, DecoderMemory) and opened.lm.info.vocab_size > opened.vocab_size:
        padded = opened.lm.forward(ForwardRequest(TOKENS, POSITIONS, full=True)).log_probs
        assert padded is not None
        assert np.exp(padded[:, opened.vocab_size :]).sum(axis=1).min() > 0  # what alignment takes away


def test_an_mlp_needs_a_key_for_each_position(opened: OpenedMemory) -> None:
    if opened.needs_keys:
        for keys in (None, np.zeros((2, 32), np.float32)):
            with pytest.raises(InvalidRequest, match="needs a key for each of 3 positions"):
                opened.log_probs(TOKENS, POSITIONS, keys)


def test_it_is_not_opened_beside_a_model_with_another_tokenizer(opened: OpenedMemory, tmp_path: Path) -> None:
    tiny_models.save(tiny_models.random_model(tiny_models.CONFIGS["llama"]()), tmp_path / "other")
    other = LanguageModel.load(str(tmp_path / "other"), device="cpu").info
    with pytest.raises(DatastoreMismatch, match="tokenizer"):
        opened.manifest.refuse_other(other)
