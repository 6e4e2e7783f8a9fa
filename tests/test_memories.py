"""Memories as sources: a second model that reads what the LM reads, against mixtures made by hand."""

import asyncio
import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.errors import (
    DatastoreMismatch,
    InvalidRequest,
    KnnlmError,
    TooLarge,
    Unavailable,
    UnknownModel,
    UnknownVersion,
)
from knnlm.generation import GenerationOptions, Generator
from knnlm.memories import KeyMemory, aligned
from knnlm.messages import DomainInfo, ForwardRequest, ForwardResult, ModelInfo, TrainedMemory
from knnlm.mixer import Mixer, Options
from knnlm.options import KnnOptions, MemoryOptions
from knnlm.prompts import score_prompt
from knnlm.rounds import Rounds
from knnlm.rows import StepRequest
from knnlm.sampling import SamplingOptions
from knnlm.sources import UsedMemory
from knnlm.testing import ToyLanguageModel
from tests.test_mixer import TEXT, TOY, BruteForce, Lm, knn

TOKENS = TOY.tokenizer.encode(TEXT)
CONTEXTS = [TOY.tokenizer.encode(text) for text in ("the cat", "a dog sat on", "x")]
LEARNT = ToyLanguageModel(seed=5)


class Learnt(Lm):
    """A memory that writes down what it is fed. info: what it says it is; down: what it raises."""

    def __init__(self, model: ToyLanguageModel = LEARNT) -> None:
        super().__init__()
        self.model = model
        self.info = model.info
        self.asked: list[ForwardRequest] = []
        self.down: KnnlmError | None = None

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        self.events.append("forward")
        if self.down is not None:
            raise copy.copy(self.down)
        self.asked.append(request)
        return replace(self.model.forward(request), fingerprint=self.info.fingerprint)

    async def get_model(self) -> ModelInfo:
        self.events.append("get_model")
        if self.down is not None:
            raise copy.copy(self.down)
        return self.info


class Watched(Lm):
    """The LM, writing down what it is fed."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[ForwardRequest] = []

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        self.asked.append(request)
        return await super().forward(request)


def memory(lmbda: float | None = 0.4, fail: str | None = None, name: str = "law") -> MemoryOptions:
    return MemoryOptions(name, lmbda, fail)


def made(learnt: Learnt, datastore: BruteForce | None = None, lm: Lm | None = None) -> Mixer:
    return Mixer(lm or Lm(), datastore or BruteForce(), TOY.info, memories={"law": learnt})


def after(model: ToyLanguageModel, contexts: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.float64]:
    """(n, V) log-probabilities of the token after each context, of the model alone."""
    positions = [np.array([len(c) - 1], np.int32) for c in contexts]
    log_probs = model.forward(ForwardRequest(contexts, positions, full=True)).log_probs
    assert log_probs is not None
    return log_probs.astype(np.float64)


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


async def test_a_memory_that_is_down_fails_by_name_or_degrades() -> None:
    learnt = Learnt()
    mixer = made(learnt)
    alone = await mixer.next_token(CONTEXTS)
    strict, lenient = [await mixer.plan({"memory": memory(fail=fail)}) for fail in ("fail", "lm_only")]
    learnt.down = Unavailable("nobody answers")
    for call in (mixer.step(strict, CONTEXTS), mixer.plan({"memory": memory()})):
        with pytest.raises(Unavailable, match="memory law: nobody answers"):
            await call
    answer = await mixer.step(lenient, CONTEXTS)
    np.testing.assert_array_equal(answer.mixed.log_probs, alone.mixed.log_probs)
    assert (answer.degraded, answer.memories) == ("memory law: nobody answers", ())
    score = await mixer.score(lenient, TOKENS)
    assert (score.degraded, score.memories) == ("memory law: nobody answers", ())
    assert (await mixer.plan({"memory": memory(fail="lm_only")})).degraded == "memory law: nobody answers"


async def test_what_is_known_to_be_down_is_that_of_the_kind_that_is_asked_for() -> None:
    def down(kind: str, options: KnnOptions | MemoryOptions) -> str | None:
        del options
        return "no datastore" if kind == "knn" else None

    mixer = Mixer(Lm(), BruteForce(), TOY.info, memories={"law": Learnt()}, down=down)
    lenient = knn(lmbda=0.3, on_datastore_error="lm_only")
    assert (await mixer.plan({"memory": memory(fail="lm_only")})).degraded is None
    assert (await mixer.plan({"memory": memory(fail="lm_only"), "knn": lenient})).degraded == "no datastore"


async def test_a_memory_that_was_swapped_is_asked_with_a_new_plan_and_never_in_the_midst_of_a_text() -> None:
    learnt = Learnt()
    mixer = made(learnt)
    plan = await mixer.plan({"memory": memory()})
    learnt.model = ToyLanguageModel(seed=6)
    learnt.info = learnt.model.info
    with pytest.raises(UnknownVersion, match="memory law answers as another model"):
        await mixer.step(plan, CONTEXTS)
    answer = await mixer.next_token(CONTEXTS, {"memory": memory(1.0)})
    np.testing.assert_array_equal(answer.mixed.log_probs, after(learnt.model, CONTEXTS))
    texts = Generator(mixer, TOY.tokenizer).generate(CONTEXTS[0], GenerationOptions(4), {"memory": memory()})
    await anext(texts)
    learnt.info = LEARNT.info
    with pytest.raises(Unavailable, match="cannot go on: memory law answers as another model"):
        await anext(texts)


class Swapped(Learnt):
    """Another model from the first forward pass on: what it said it was does not hold then."""

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        self.info = self.model.info
        return await super().forward(request)


async def test_a_call_is_made_again_when_the_memory_is_swapped_under_it() -> None:
    learnt = Swapped(ToyLanguageModel(seed=6))
    learnt.info = LEARNT.info
    answer = await made(learnt).next_token(CONTEXTS, {"memory": memory(1.0)})
    np.testing.assert_array_equal(answer.mixed.log_probs, after(learnt.model, CONTEXTS))
    assert answer.memories[0].fingerprint == learnt.model.info.fingerprint


def greedy(lmbda: float, prompt: npt.NDArray[np.int32], n: int) -> list[int]:
    """The likeliest tokens of the mixture of the two models, one after another."""
    tokens = prompt
    for _ in range(n):
        p = (1 - lmbda) * np.exp(after(TOY, [tokens])) + lmbda * np.exp(after(LEARNT, [tokens]))
        tokens = np.append(tokens, np.int32(p[0].argmax())).astype(np.int32)
    new: list[int] = tokens[len(prompt) :].tolist()
    return new


@pytest.mark.parametrize("partly", [False, True], ids=["whole rows", "large vocabulary"])
async def test_completions_are_those_of_the_mixture_by_hand(partly: bool) -> None:
    lm, learnt = Watched(), Learnt()
    mixer = made(learnt, lm=lm)
    rounds = Rounds(mixer, whole_row_tokens=10, likeliest=5) if partly else None
    generator = Generator(mixer, TOY.tokenizer, rounds)
    options = GenerationOptions(8, SamplingOptions(temperature=0), ignore_eos=True)
    made_text = await generator.complete(CONTEXTS[0], options, {"memory": memory(0.6)})
    assert made_text.tokens == greedy(0.6, CONTEXTS[0], 8)
    assert made_text.memories[0].name == "law"
    assert all(request.cache for request in learnt.asked)
    assert len(lm.asked) == len(learnt.asked) == 8
    drawn = GenerationOptions(8, SamplingOptions(temperature=0.7, top_p=0.9), ignore_eos=True)
    texts = [
        await Generator(mixer, TOY.tokenizer, r).complete(CONTEXTS[0], drawn, {"memory": memory(0.6)}, seed=3)
        for r in (None, Rounds(mixer, whole_row_tokens=10, likeliest=5))
    ]
    assert texts[0].tokens == texts[1].tokens


async def test_a_prompt_is_scored_as_the_text_is() -> None:
    mixer, asked = made(Learnt()), {"knn": knn(lmbda=0.2), "memory": memory(0.3)}
    prompt = TOKENS[:30]
    scored = await score_prompt(mixer, await mixer.plan(asked), prompt, 3, {})
    expected = await mixer.score_text(prompt, asked)
    np.testing.assert_allclose([t.log_prob for t in scored.tokens], expected.log_probs, rtol=1e-6)


async def test_a_memory_with_a_shorter_context_bounds_what_it_is_asked() -> None:
    learnt = Learnt(ToyLanguageModel(seed=5, context_length=12))
    mixer, asked = made(learnt), {"memory": memory()}
    score = await mixer.score_text(TOKENS, asked)
    assert (score.context_length, score.min_context) == (12, 6)
    with pytest.raises(InvalidRequest, match="12") as caught:
        await mixer.score_text(TOKENS, asked, context_length=20)
    assert caught.value.param == "context_length"
    for call in (
        mixer.next_token([TOKENS[:13]], asked),
        Rounds(mixer).step(StepRequest(await mixer.plan(asked), TOKENS[:13])),
    ):
        with pytest.raises(TooLarge, match="13 tokens, the memory that is mixed takes 12"):
            await call
    generator = Generator(mixer, TOY.tokenizer)
    with pytest.raises(InvalidRequest, match="the memory that is mixed takes 12"):
        await generator.complete(TOKENS[:12], GenerationOptions(3), asked)
    made_text = await generator.complete(TOKENS[:9], GenerationOptions(20, ignore_eos=True), asked)
    assert (len(made_text.tokens), made_text.finish) == (3, "length")
    assert len((await generator.complete(TOKENS[:9], GenerationOptions(20, ignore_eos=True))).tokens) == 20


async def test_a_token_that_only_the_padded_model_has_is_refused_by_name() -> None:
    lm = ToyLanguageModel(padding=4)
    mixer = Mixer(Learnt(lm), None, lm.info, memories={"law": Learnt()})
    with pytest.raises(InvalidRequest, match="token 260 is outside the vocabulary of memory law, 258"):
        await mixer.next_token([np.array([0, 260], np.int32)], {"memory": memory()})


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


class Slow(Learnt):
    """Answers once it is let, and writes down that it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.let = asyncio.Event(), asyncio.Event()
        self.cancelled = False

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        self.begun.set()
        try:
            await self.let.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return await super().forward(request)


class Waiting(Lm):
    """The LM, which answers once the memory was asked, or fails then."""

    def __init__(self, learnt: Slow, error: KnnlmError | None = None) -> None:
        super().__init__()
        self.learnt, self.error = learnt, error

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        await asyncio.wait_for(self.learnt.begun.wait(), 10)
        if self.error is not None:
            raise self.error
        self.learnt.let.set()
        return await super().forward(request)


async def test_the_memory_works_while_the_language_model_does() -> None:
    for rounds in (False, True):
        learnt = Slow()
        mixer = made(learnt, lm=Waiting(learnt))
        asked = {"memory": memory(1.0)}
        ask = Rounds(mixer).next_token(CONTEXTS[0], asked) if rounds else mixer.next_token(CONTEXTS[:1], asked)
        answer = await asyncio.wait_for(ask, 10)
        np.testing.assert_array_equal(answer.mixed.log_probs, after(LEARNT, CONTEXTS[:1]))


async def test_a_memory_is_let_go_when_the_language_model_fails() -> None:
    for rounds in (False, True):
        learnt = Slow()
        mixer = made(learnt, lm=Waiting(learnt, Unavailable("the lm is gone")))
        asked = {"memory": memory()}
        ask = Rounds(mixer).next_token(CONTEXTS[0], asked) if rounds else mixer.next_token(CONTEXTS[:1], asked)
        with pytest.raises(Unavailable, match="the lm is gone"):
            await asyncio.wait_for(ask, 10)
        for _ in range(5):
            await asyncio.sleep(0)
        assert learnt.cancelled
