"""Memories as sources: a second model that reads what the LM reads, against mixtures made by hand."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.errors import (
    DatastoreMismatch,
    InvalidRequest,
    KnnlmError,
    Unavailable,
    UnknownModel,
)
from knnlm.generation import GenerationOptions, Generator
from knnlm.memories import KeyMemory, aligned, stale
from knnlm.messages import DomainInfo, ForwardRequest, ModelInfo, TrainedMemory
from knnlm.mixer import Mixer, Options
from knnlm.options import MemoryOptions
from knnlm.sampling import SamplingOptions
from knnlm.sources import UsedMemory
from knnlm.testing import ToyLanguageModel
from tests.learnt import CONTEXTS, LEARNT, TOKENS, Learnt, Watched, after, made, memory
from tests.test_mixer import TOY, BruteForce, Lm, knn


async def test_a_memory_of_weight_zero_is_not_asked_and_changes_no_bit() -> None:
    learnt = Learnt()
    learnt.down = Unavailable("down")
    for others in ({}, {"knn": knn(lmbda=0.3)}):
        mixer, asked = made(learnt), {**others, "memory": memory(0.0)}
        with_it, without = await mixer.next_token(CONTEXTS, asked), await mixer.next_token(CONTEXTS, others)
        np.testing.assert_array_equal(with_it.mixed.log_probs, without.mixed.log_probs)
        assert with_it.memories == (UsedMemory("law", 0.0),)
        score, alone = await mixer.score_text(TOKENS, asked), await mixer.score_text(TOKENS, others)
        np.testing.assert_array_equal(score.log_probs, alone.log_probs)
        assert len(score.mixed.components) == len(others)
    assert learnt.events == []


async def test_a_memory_of_weight_one_is_the_mixture() -> None:
    mixer, asked = made(Learnt()), {"memory": memory(1.0)}
    answer = await mixer.next_token(CONTEXTS, asked)
    np.testing.assert_array_equal(answer.mixed.log_probs, after(LEARNT, CONTEXTS))
    score = await mixer.score_text(TOKENS, asked)
    alone = await Mixer(Learnt(), None, LEARNT.info).score_text(TOKENS)
    np.testing.assert_array_equal(score.log_probs, alone.lm_log_probs.astype(np.float64))


async def test_a_memory_is_mixed_beside_a_domain_as_by_hand() -> None:
    mixer, asked = made(Learnt()), {"knn": knn(lmbda=0.3), "memory": memory(0.4)}
    answer = await mixer.next_token(CONTEXTS, asked)
    retrieved = (await mixer.next_token(CONTEXTS, knn(lmbda=1.0))).mixed.log_probs
    lm, learnt = after(TOY, CONTEXTS), after(LEARNT, CONTEXTS)
    expected = 0.3 * np.exp(lm) + 0.3 * np.exp(retrieved) + 0.4 * np.exp(learnt)
    np.testing.assert_allclose(np.exp(answer.mixed.log_probs), expected, rtol=1e-6)
    assert [(c.name, c.kind) for c in answer.mixed.components] == [("toy", "knn"), ("law", "memory")]
    assert answer.memories == (UsedMemory("law", 0.4, "toy", LEARNT.info.fingerprint),)
    assert len(answer.domains) == 1


class OwnBos(BruteForce):
    """Its keys were made of windows that begin with a BOS of their own."""

    async def get_domain(self, domain: str, version: str | None = None) -> DomainInfo:
        info = await super().get_domain(domain, version)
        return replace(info, config_sha256=TOY.info.config_sha256, bos_token_id=0, window_bos="window")


@pytest.mark.parametrize("datastore", [BruteForce, OwnBos])
async def test_the_memory_is_fed_what_the_language_model_is_fed(datastore: type[BruteForce]) -> None:
    lm, learnt = Watched(), Learnt()
    mixer = made(learnt, datastore(), lm)
    await mixer.score_text(TOKENS, {"knn": knn(lmbda=0.3), "memory": memory()}, context_length=16, min_context=8)
    await mixer.next_token(CONTEXTS, {"memory": memory()})
    fed = [[(r.tokens, r.positions) for r in asked] for asked in (lm.asked, learnt.asked)]
    assert len(fed[0]) == len(fed[1]) >= 2
    for ours, theirs in zip(*fed, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert all(map(np.array_equal, one, other))
    later = [tokens[0] for tokens in lm.asked[0].tokens[1:]]
    assert (set(later) == {0}) is (datastore is OwnBos)


async def test_a_text_of_several_windows_is_scored_as_by_hand() -> None:
    mixer = made(Learnt())
    score = await mixer.score_text(TOKENS, {"memory": memory(0.25)})
    alone = await Mixer(Learnt(), None, LEARNT.info).score_text(TOKENS)
    expected = np.log(0.75 * np.exp(score.lm_log_probs.astype(np.float64)) + 0.25 * np.exp(alone.log_probs))
    np.testing.assert_allclose(score.log_probs, expected, rtol=1e-6)
    assert len(TOKENS) > 2 * TOY.info.context_length


@pytest.mark.parametrize("padding", [(0, 6), (6, 0), (6, 11)], ids=["memory wider", "lm wider", "both padded"])
async def test_widths_are_aligned_and_each_distribution_adds_up_to_one(padding: tuple[int, int]) -> None:
    lm, learnt = ToyLanguageModel(padding=padding[0]), ToyLanguageModel(seed=5, padding=padding[1])
    mixer = Mixer(Learnt(lm), None, lm.info, memories={"law": Learnt(learnt)})
    answer = await mixer.next_token(CONTEXTS, {"memory": memory(0.4)})
    np.testing.assert_allclose(np.exp(answer.mixed.log_probs).sum(axis=1), 1.0, rtol=1e-6)
    whole, shared = after(learnt, CONTEXTS), min(lm.info.vocab_size, learnt.info.vocab_size)
    p = np.exp(whole[:, :shared]) / (
        np.exp(whole[:, :shared]).sum(axis=1, keepdims=True) if padding[1] > padding[0] else 1
    )
    expected = 0.6 * np.exp(after(lm, CONTEXTS))
    expected[:, :shared] += 0.4 * p
    np.testing.assert_allclose(np.exp(answer.mixed.log_probs), expected, rtol=1e-6)
    text = TOKENS[:30]
    score = await mixer.score_text(text, {"memory": memory(0.4)})
    rows = (await mixer.next_token([text[: i + 1] for i in range(29)], {"memory": memory(0.4)})).mixed.log_probs
    np.testing.assert_allclose(score.log_probs, rows[np.arange(29), text[1:]], rtol=1e-6)


def test_a_memory_whose_mass_is_all_outside_has_none_inside() -> None:
    with np.errstate(divide="ignore"):
        inside = aligned(np.log(np.array([[0.5, 0.25, 0.25]], np.float32)), 2)
    np.testing.assert_allclose(np.exp(inside), [[2 / 3, 1 / 3]], rtol=1e-6)


FOREIGN = replace(LEARNT.info, tokenizer_sha256="0" * 64)
REFUSED: dict[str, tuple[ModelInfo, Options, type[KnnlmError], str, str]] = {
    "unknown": (LEARNT.info, {"memory": memory(name="med")}, UnknownModel, "memory.name", "known: law"),
    "another tokenizer": (FOREIGN, {"memory": memory()}, DatastoreMismatch, "memory.name", "0" * 64),
    "another bos": (
        replace(LEARNT.info, bos_token_id=7), {"memory": memory()}, DatastoreMismatch, "memory.name", "bos_token_id 7",
    ),
    "no weight": (LEARNT.info, {"memory": memory(None)}, InvalidRequest, "memory.lambda", "no fitted weight"),
    "too much": (
        LEARNT.info, {"memory": memory(0.8), "knn": knn(lmbda=0.3)}, InvalidRequest, "lambda", "add up to 1.1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
async def test_what_can_be_refused_costs_no_forward_pass(name: str) -> None:
    info, options, error, param, words = REFUSED[name]
    learnt, lm = Learnt(), Lm()
    learnt.info = info
    mixer = made(learnt, lm=lm)
    for call in (mixer.next_token(CONTEXTS, options), mixer.score_text(TOKENS, options)):
        with pytest.raises(error, match=words) as caught:
            await call
        assert caught.value.param == param
    assert "forward" not in lm.events + learnt.events


@pytest.mark.parametrize(
    ("lmbda", "fail", "name"),
    [(1.5, None, "law"), (float("nan"), None, "law"), (0.5, "later", "law"), (0.5, None, "")],
)
def test_options_that_cannot_be_are_refused_by_their_name(lmbda: float, fail: str | None, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        MemoryOptions(name, lmbda, fail)
    assert caught.value.param == ("name" if not name else "on_memory_error" if fail else "lambda")


class Net:
    """The output layer of another toy model over the keys of the first."""

    vocab_size = TOY.info.vocab_size

    def log_probs(self, keys: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        return LEARNT._log_probs(keys.astype(np.float64))

    def target_log_probs(
        self, keys: npt.NDArray[np.floating], targets: npt.NDArray[np.integer]
    ) -> npt.NDArray[np.float32]:
        chosen: npt.NDArray[np.float32] = self.log_probs(keys)[np.arange(len(keys)), targets]
        return chosen


TRAINED = TrainedMemory("law", "v1", "c" * 64, 40, 0.5, 0.35)
MLP = KeyMemory(Net(), "law-mlp", "f" * 16, TOY.info.fingerprint, TRAINED)


async def test_an_mlp_memory_reads_the_keys_of_the_language_model() -> None:
    mixer = Mixer(Lm(), BruteForce(), TOY.info, memories={"law": MLP})
    asked = {"memory": memory(None), "knn": knn(lmbda=0.3)}
    answer = await mixer.next_token(CONTEXTS, asked)
    retrieved = (await mixer.next_token(CONTEXTS, knn(lmbda=1.0))).mixed.log_probs
    positions = [np.array([len(c) - 1], np.int32) for c in CONTEXTS]
    keys = TOY.forward(ForwardRequest(CONTEXTS, positions, keys=True)).keys
    assert keys is not None
    learnt = np.exp(Net().log_probs(keys).astype(np.float64))
    expected = 0.35 * np.exp(after(TOY, CONTEXTS)) + 0.3 * np.exp(retrieved) + 0.35 * learnt
    np.testing.assert_allclose(np.exp(answer.mixed.log_probs), expected, rtol=1e-6)
    assert answer.memories == (UsedMemory("law", 0.35, "law-mlp", "f" * 16),)
    text = TOKENS[:30]
    score = await mixer.score_text(text, asked)
    rows = (await mixer.next_token([text[: i + 1] for i in range(29)], asked)).mixed.log_probs
    np.testing.assert_allclose(score.log_probs, rows[np.arange(29), text[1:]], rtol=1e-6)
    options = GenerationOptions(5, SamplingOptions(temperature=0), ignore_eos=True)
    made_text = await Generator(mixer, TOY.tokenizer).complete(CONTEXTS[0], options, asked)
    assert made_text.log_probs[0] == pytest.approx(float(np.log(expected[0].max())))


async def test_a_memory_is_stale_once_its_domain_answers_from_another_version() -> None:
    now = await BruteForce().get_domain("toy")
    trained = replace(TRAINED, domain=now.domain, version=now.version)
    assert stale(trained, [now]) is None
    assert stale(replace(trained, domain="med"), [now]) is None  # not served here: not known
    assert stale(None, [now]) is None
    said = stale(replace(trained, version="v0"), [now])
    assert said is not None
    assert said.startswith(f"trained on toy v0 (40 entries), which answers from {now.version} now")


async def test_a_memory_of_other_keys_or_another_vocabulary_is_refused_with_both_values() -> None:
    for lm in (ToyLanguageModel(seed=9), ToyLanguageModel(padding=2)):
        mixer = Mixer(Learnt(lm), None, lm.info, memories={"law": MLP})
        with pytest.raises(DatastoreMismatch, match=lm.info.fingerprint):
            await mixer.next_token(CONTEXTS, {"memory": memory()})
        assert (await mixer.next_token(CONTEXTS, {"memory": memory(0.0)})).degraded is None


async def test_a_weight_that_was_fitted_holds_and_gives_way_to_those_that_are_asked_for() -> None:
    learnt = Learnt()
    learnt.info = replace(learnt.info, memory=TRAINED)
    mixer = made(learnt)
    fitted, asked = [await mixer.next_token(CONTEXTS, {"memory": memory(w)}) for w in (None, 0.35)]
    np.testing.assert_array_equal(fitted.mixed.log_probs, asked.mixed.log_probs)
    beside = await mixer.next_token(CONTEXTS, {"memory": memory(None), "knn": knn(lmbda=0.8)})
    np.testing.assert_allclose(beside.mixed.components[1].weight, 0.19)
