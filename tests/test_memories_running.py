"""Memories in use: one that is down, swapped or slow, completions, and contexts of its own."""

import asyncio

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.errors import (
    InvalidRequest,
    KnnlmError,
    TooLarge,
    Unavailable,
    UnknownVersion,
)
from knnlm.generation import GenerationOptions, Generator
from knnlm.messages import ForwardRequest, ForwardResult
from knnlm.mixer import Mixer
from knnlm.options import KnnOptions, MemoryOptions
from knnlm.prompts import score_prompt
from knnlm.rounds import Rounds
from knnlm.rows import StepRequest
from knnlm.sampling import SamplingOptions
from knnlm.testing import ToyLanguageModel
from tests.learnt import CONTEXTS, LEARNT, TOKENS, Learnt, Watched, after, made, memory
from tests.test_mixer import TOY, BruteForce, Lm, knn


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
