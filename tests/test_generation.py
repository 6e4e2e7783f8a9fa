"""Completions over a toy model and a datastore that searches by brute force."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from knnlm.ahead import StepsAhead
from knnlm.errors import InvalidRequest, Unavailable
from knnlm.generation import GenerationOptions, Generator, NewToken
from knnlm.joined import JoinedSearches
from knnlm.mixer import Mixer, Options
from knnlm.options import DomainOptions, KnnOptions
from knnlm.rounds import Rounds
from knnlm.sampling import Known, SamplingOptions, choose, uniform
from tests.test_mixer import TOY, BruteForce, Lm
from tests.toys import COUNTS, CountOptions, counts  # noqa: F401  a fixture

PROMPT = TOY.tokenizer.encode("the cat")
KNN = KnnOptions((DomainOptions("toy", lmbda=0.4),))
GREEDY = SamplingOptions(temperature=0)
FREE = SamplingOptions(temperature=1.5)
LONG = GenerationOptions(max_tokens=20, ignore_eos=True)


def generator(datastore: BruteForce | None = None, *, partly: bool = False) -> Generator:
    mixer = Mixer(Lm(), JoinedSearches(datastore or BruteForce()), TOY.info)
    return Generator(mixer, TOY.tokenizer, Rounds(mixer, whole_row_tokens=10, likeliest=40) if partly else None)


async def run(made: Generator, options: GenerationOptions = LONG, knn: Options = KNN, **more: int) -> list[NewToken]:
    return [new async for new in made.generate(PROMPT, options, knn, **more)]


def tokens(new: list[NewToken]) -> list[int]:
    return [one.token for one in new]


async def test_equals_choosing_from_each_distribution_in_turn() -> None:
    made = generator()
    for sampling in (GREEDY, FREE, SamplingOptions(top_p=0.7, presence_penalty=1.0)):
        new = await run(made, replace(LONG, sampling=sampling), seed=5, choice=2)
        context, seen_counts = list(PROMPT), dict.fromkeys(range(TOY.info.vocab_size), 0)
        mixer = Mixer(Lm(), BruteForce(), TOY.info)
        for step, one in enumerate(new):
            mixed = (await mixer.next_token([np.array(context, np.int32)], KNN)).mixed
            known = Known(np.arange(TOY.info.vocab_size), mixed.log_probs[0])
            seen = {token: count for token, count in seen_counts.items() if count}
            assert one.token == choose(known, sampling, seen, uniform(5, 2, step))
            assert one.log_prob == pytest.approx(mixed.log_probs[0, one.token])
            assert one.lm_log_prob == pytest.approx(float(mixed.lm_log_probs[0, one.token]))
            seen_counts[one.token] += 1
            context.append(one.token)


@pytest.mark.parametrize("sampling", [GREEDY, FREE, SamplingOptions(top_k=5), SamplingOptions(frequency_penalty=0.5)])
async def test_alone_in_company_and_with_parts_of_rows_it_is_the_same(sampling: SamplingOptions) -> None:
    options = replace(LONG, sampling=sampling, top=3)
    alone = await run(generator(), options, seed=1)
    made, partly = generator(), generator(partly=True)
    company = await asyncio.gather(
        run(made, options, seed=1), run(made, options, None, seed=2), run(made, options, seed=3)
    )
    parts = await asyncio.gather(run(partly, options, seed=1), run(partly, options, seed=3))
    assert tokens(company[0]) == tokens(alone) == tokens(parts[0])
    assert tokens(company[2]) == tokens(parts[1])
    for one, other in zip(alone, parts[0], strict=True):
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
        assert one.log_prob == pytest.approx(other.log_prob)
        assert [c[:3] for c in one.row.components(one.token)] == [c[:3] for c in other.row.components(other.token)]


async def test_completions_advance_together() -> None:
    mixer = Mixer(lm := Lm(), JoinedSearches(datastore := BruteForce()), TOY.info)
    made = Generator(mixer, TOY.tokenizer)
    await asyncio.gather(*(run(made, seed=seed) for seed in range(8)))
    assert lm.events.count("forward") == 20
    assert len(datastore.asked) == 20


async def test_it_ends_at_eos_and_its_text_is_left_out() -> None:
    always = SamplingOptions(logit_bias={TOY.info.eos_token_id or 0: 100.0})
    (only,) = await run(generator(), GenerationOptions(max_tokens=5, sampling=always))
    assert (only.token, only.text, only.finish, only.stopped_at) == (TOY.info.eos_token_id, "", "stop", None)
    on = await run(generator(), GenerationOptions(max_tokens=5, sampling=always, ignore_eos=True))
    assert len(on) == 5
    assert on[-1].finish == "length"
    assert not any(one.text for one in on)


async def test_it_ends_at_a_stop_token_and_at_a_stop_string() -> None:
    letter = int(TOY.tokenizer.encode("q")[1])
    always = SamplingOptions(logit_bias={letter: 100.0})
    (only,) = await run(generator(), GenerationOptions(9, always, stop_token_ids=(letter,)))
    assert (only.text, only.finish, only.stopped_at) == ("", "stop", letter)
    new = await run(generator(), GenerationOptions(9, always, stop=("qqq",)))
    assert [one.text for one in new] == ["", "", ""]
    assert (new[-1].finish, new[-1].stopped_at) == ("stop", "qqq")
    new = await run(generator(), GenerationOptions(2, always, stop=("qqq",)))
    assert [one.text for one in new] == ["", "qq"]
    assert new[-1].finish == "length"
    assert [one.offset for one in new] == [0, 1]


async def test_it_ends_where_the_model_has_no_more_room() -> None:
    new = await run(generator(), GenerationOptions(max_tokens=1000, ignore_eos=True))
    assert len(PROMPT) + len(new) == TOY.info.context_length
    assert new[-1].finish == "length"


async def test_a_version_holds_for_the_whole_completion() -> None:
    datastore = BruteForce()
    made = generator(datastore)
    expected = tokens(await run(made, seed=4))
    new = []
    async for one in made.generate(PROMPT, LONG, KNN, seed=4):
        new.append(one.token)
        datastore.current = "v2"
    assert new == expected
    assert {request.version for request in datastore.asked} == {"v1"}


async def test_one_that_is_left_by_an_error_is_closed_before_the_error_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    async def close(self: StepsAhead) -> None:
        closed.append(self)

    def interrupted(_new: NewToken) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StepsAhead, "close", close)
    with pytest.raises(KeyboardInterrupt):
        await generator().complete(PROMPT, LONG, KNN, on_token=interrupted)
    assert len(closed) == 1


async def test_a_version_that_is_let_go_meanwhile_ends_it_with_an_error() -> None:
    datastore = BruteForce()
    completion = generator(datastore).generate(PROMPT, LONG, KNN)
    await anext(completion)
    del datastore.values["v1"]
    with pytest.raises(Unavailable, match="cannot go on"):
        await anext(completion)


async def test_a_datastore_that_dies_is_said_and_the_lm_goes_on_where_it_may() -> None:
    datastore = BruteForce()
    new = []
    async for one in generator(datastore).generate(PROMPT, LONG, replace(KNN, on_datastore_error="lm_only")):
        new.append(one)
        datastore.down = Unavailable("away")
    assert [one.degraded for one in new] == [None, *["away"] * 19]


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"max_tokens": -1}, InvalidRequest, "max_tokens must be >= 0"),
        ({"top": -1}, InvalidRequest, "top"),
        ({"carriers": -1}, InvalidRequest, "carriers must be >= 0"),
        ({"passage_tokens": -5}, InvalidRequest, "passage_tokens must be >= 0"),
        ({"stop": ("",)}, InvalidRequest, "a stop string must have"),
        ({"stop": ("x",) * 65}, InvalidRequest, "stop may hold 64"),
        ({"stop_token_ids": (258,)}, InvalidRequest, "stop_token_ids names token 258"),
        ({"sampling": SamplingOptions(logit_bias={-1: 1.0})}, InvalidRequest, "logit_bias names token -1"),
    ],
)
async def test_wrong_values_are_named(options: dict[str, object], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        await run(generator(), GenerationOptions(**options))  # type: ignore[arg-type]


async def test_a_prompt_that_cannot_be_continued_is_refused() -> None:
    made = generator()
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        made.room(PROMPT[:0], 1)
    with pytest.raises(InvalidRequest, match="32 tokens"):
        made.room(np.zeros(32, np.int32), 1)
    assert made.room(np.zeros(32, np.int32), 0) == 0


@pytest.mark.usefixtures("counts")
async def test_a_source_keeps_what_it_needs_from_token_to_token() -> None:
    """The toy source counts the text's own tokens, each once, and gives every token a probability."""
    for partly in (False, True):
        made = generator(partly=partly)
        first, second = await asyncio.gather(*(run(made, LONG, {COUNTS: CountOptions(0.5)}, seed=s) for s in (1, 2)))
        assert tokens(first) != tokens(second)
        for new in (first, second):
            text = list(PROMPT)
            for one in new:
                share = text.count(one.token) / len(text)
                (component,) = one.row.components(one.token)
                assert component[3] == pytest.approx(np.log(share) if share else -np.inf)
                text.append(one.token)
