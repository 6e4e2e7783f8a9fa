"""Completions whose steps are begun ahead: the same as those that wait for every search."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from knnlm.ahead import StepsAhead
from knnlm.errors import InvalidRequest, Unavailable
from knnlm.generation import Completion, GenerationOptions, Generator
from knnlm.index.searcher import Searcher
from knnlm.local import LocalDatastore, LocalLanguageModel
from knnlm.messages import ForwardRequest, ForwardResult, SearchRequest, SearchResult
from knnlm.mixer import Mixer
from knnlm.options import DomainOptions, KnnOptions, ReuseOptions
from knnlm.pipeline import Pipeline
from knnlm.rounds import Rounds
from knnlm.sampling import SamplingOptions
from knnlm.testing import ToyLanguageModel, toy_datastore

TEXT = "the cat sat on the mat; the"


@pytest.fixture
def pipeline(tmp_path: Path) -> Iterator[Pipeline]:
    lm = ToyLanguageModel()
    with Pipeline(lm, {"cat": Searcher.open(toy_datastore(tmp_path, domain="cat", lm=lm))}) as p:
        yield p


def knn(ahead: int, lmbda: float = 0.5) -> KnnOptions:
    return KnnOptions((DomainOptions("cat", lmbda=lmbda, temperature=1.0),), reuse=ReuseOptions(ahead=ahead))


SAMPLINGS = [
    SamplingOptions(temperature=0.0),
    SamplingOptions(temperature=0.3),
    SamplingOptions(temperature=1.0, top_p=0.9),
    SamplingOptions(temperature=0.8, presence_penalty=0.5, logit_bias={5: 1.0}),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("ahead", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("whole_row_tokens", [100, 16_384])
def test_the_text_is_the_same(pipeline: Pipeline, sampling: SamplingOptions, ahead: int, whole_row_tokens: int) -> None:
    options = GenerationOptions(max_tokens=12, sampling=sampling, ignore_eos=True)
    prompt = pipeline.tokenizer.encode(TEXT[:15])
    mixer = Mixer(LocalLanguageModel(pipeline.lm), LocalDatastore(pipeline.searchers), pipeline.lm.info)

    async def made(steps: int, lmbda: float) -> Completion:
        generator = Generator(mixer, pipeline.tokenizer, Rounds(mixer, whole_row_tokens=whole_row_tokens, likeliest=9))
        return await generator.complete(prompt, options, knn(steps, lmbda), seed=7)

    for lmbda in (0.0, 0.5, 1.0):
        drafted, plain = asyncio.run(made(ahead, lmbda)), asyncio.run(made(0, lmbda))
        assert (drafted.tokens, drafted.text, drafted.finish) == (plain.tokens, plain.text, plain.finish)
        assert drafted.log_probs == pytest.approx(plain.log_probs, rel=1e-6)


def test_drafts_that_are_right_are_kept_and_nothing_is_left_behind(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[StepsAhead] = []
    original = StepsAhead.__init__

    def noted(self: StepsAhead, *given: object) -> None:
        original(self, *given)  # type: ignore[arg-type]
        made.append(self)

    class Slow(LocalDatastore):
        async def search(self, request: SearchRequest) -> SearchResult:
            await asyncio.sleep(0.05)  # so that a draft can be made meanwhile
            return await super().search(request)

    monkeypatch.setattr(StepsAhead, "__init__", noted)
    mixer = Mixer(LocalLanguageModel(pipeline.lm), Slow(pipeline.searchers), pipeline.lm.info)
    options = GenerationOptions(max_tokens=14, sampling=SamplingOptions(temperature=0.0), ignore_eos=True)
    prompt = pipeline.tokenizer.encode(TEXT[:12])

    async def run(lmbda: float) -> int:
        generator = Generator(mixer, pipeline.tokenizer)
        await generator.complete(prompt, options, knn(2, lmbda), seed=1)
        await asyncio.sleep(0.01)
        return len(asyncio.all_tasks()) - 1

    assert asyncio.run(run(0.0)) == 0
    assert made[-1].kept == made[-1].begun > 0  # the LM alone is never wrong about itself
    assert asyncio.run(run(1.0)) == 0
    assert made[-1].kept < made[-1].begun


async def test_a_search_that_fails_ends_the_completion_and_every_draft(pipeline: Pipeline) -> None:
    class Failing(LocalDatastore):
        left = 3

        async def search(self, request):  # type: ignore[no-untyped-def]
            self.left -= 1
            if self.left < 0:
                raise Unavailable("gone")
            await asyncio.sleep(0.02)
            return await super().search(request)

    mixer = Mixer(LocalLanguageModel(pipeline.lm), Failing(pipeline.searchers), pipeline.lm.info)
    generator = Generator(mixer, pipeline.tokenizer)
    options = GenerationOptions(max_tokens=12, ignore_eos=True)
    with pytest.raises(Unavailable, match="gone"):
        await generator.complete(pipeline.tokenizer.encode("a"), options, knn(3), seed=1)
    await asyncio.sleep(0.05)
    assert len(asyncio.all_tasks()) == 1


async def test_completions_that_run_at_the_same_time_share_rounds_and_draft_nothing(pipeline: Pipeline) -> None:
    passes: list[int] = []

    class Counting(LocalLanguageModel):
        async def forward(self, request: ForwardRequest) -> ForwardResult:
            passes.append(len(request.tokens))
            return await super().forward(request)

    mixer = Mixer(Counting(pipeline.lm), LocalDatastore(pipeline.searchers), pipeline.lm.info)
    generator = Generator(mixer, pipeline.tokenizer)
    options = GenerationOptions(max_tokens=10, sampling=SamplingOptions(temperature=0.5), ignore_eos=True)
    prompt = pipeline.tokenizer.encode(TEXT[:12])
    await asyncio.gather(*(generator.complete(prompt, options, knn(16), seed=i) for i in range(8)))
    assert len(passes) <= 2 * options.max_tokens
    passes.clear()
    await generator.complete(prompt, options, knn(2), seed=1)
    assert len(passes) > options.max_tokens  # alone again, with drafts


@pytest.mark.parametrize("ahead", [-1, 17])
def test_numbers_out_of_range_are_refused(ahead: int) -> None:
    with pytest.raises(InvalidRequest, match="ahead"):
        ReuseOptions(ahead=ahead)
