"""Rules that decide before the search: what they give no weight is not searched for, and nothing else changes."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from knnlm.errors import Unavailable
from knnlm.generation import GenerationOptions, Generator
from knnlm.joined import JoinedSearches
from knnlm.messages import SearchRequest, SearchResult
from knnlm.mixer import Mixer
from knnlm.options import DomainOptions, KnnOptions
from knnlm.prompts import score_prompt
from knnlm.rules import GAIN, LARGEST_LAMBDA, SKIP_BELOW
from knnlm.sampling import SamplingOptions
from knnlm.tuning_records import Tuning
from tests.test_mixer import TEXT, TOY, TUNING, BruteForce, Lm, knn

TOKENS = TOY.tokenizer.encode(TEXT)
GATE: dict[str, float | Sequence[float]] = {
    "bias": 3.0,
    "linear": [-1.0, 1.5],
}  # of the entropy and the largest probability, and then of the key


KEY = 0.1 * np.random.default_rng(0).standard_normal(TOY.info.key_dim)


@pytest.fixture(autouse=True, params=["fitted to statistics alone", "fitted to keys, too"])
def gate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "keys" in request.param:
        monkeypatch.setitem(GATE, "linear", [-1.0, 1.5, *KEY])


def tuned(skip_below: float) -> Tuning:
    """skip_below: of the weight, from which the expected gain rises and falls here."""
    with np.errstate(divide="ignore"):
        logit = np.log(skip_below) - np.log(LARGEST_LAMBDA - min(skip_below, LARGEST_LAMBDA))
    linear, below = np.ravel(GATE["linear"]).tolist(), float(np.clip(logit, -1e9, 1e9)) - 1e-9
    parameters = {**GATE, GAIN: (3.0, -1.0, 1.5, 0.0, 0.0, 0.0, *linear[2:]), SKIP_BELOW: below}
    return replace(TUNING, rule="gate_lm", parameters=parameters)


async def weights() -> np.ndarray:
    """Of every token of the text, without skipping."""
    return (await Mixer(Lm(), BruteForce(tuning=tuned(0.0)), TOY.info).score_text(TOKENS, knn())).weight


async def half() -> float:
    return float(np.median(await weights()))


def searched(store: BruteForce) -> int:
    return sum(len(request.queries) for request in store.asked)


async def test_half_of_the_searches_are_left_out_and_the_rest_weighs_as_before() -> None:
    before, below = await weights(), await half()
    skipped: list[int] = []
    store = BruteForce(tuning=tuned(below))
    score = await Mixer(Lm(), store, TOY.info, batch_tokens=64, skipped=skipped.append).score_text(TOKENS, knn())
    kept = before >= below
    np.testing.assert_allclose(score.weight, np.where(kept, before, 0), rtol=1e-6)
    assert searched(store) == kept.sum()
    assert sum(skipped) == (~kept).sum()
    np.testing.assert_array_equal(score.log_probs[~kept], score.lm_log_probs[~kept].astype(np.float64))
    whole = await Mixer(Lm(), BruteForce(tuning=tuned(0.0)), TOY.info).score_text(TOKENS, knn())
    np.testing.assert_allclose(score.log_probs[kept], whole.log_probs[kept], rtol=1e-9)


async def test_every_way_to_ask_leaves_out_the_same() -> None:
    below = await half()
    score = await Mixer(Lm(), BruteForce(tuning=tuned(below)), TOY.info).score_text(TOKENS[:30], knn())
    store = BruteForce(tuning=tuned(below))
    mixer = Mixer(Lm(), JoinedSearches(store), TOY.info)
    answer = await mixer.next_token([TOKENS[:i] for i in range(1, 30)], knn(), passages=1)
    np.testing.assert_allclose(answer.mixed.weight, score.weight, rtol=1e-6)
    assert 0 < searched(store) == (score.weight > 0).sum() < 29
    rows = answer.mixed.log_probs
    np.testing.assert_allclose(rows[np.arange(29), TOKENS[1:30]], score.log_probs, rtol=1e-6)
    np.testing.assert_allclose(np.logaddexp.reduce(rows, axis=1), 0, atol=1e-6)
    assert [result.neighbors.present.tolist() for result in answer.found] == [(score.weight > 0).tolist()]

    prompt = await score_prompt(mixer, await mixer.plan({"knn": knn()}), TOKENS[:30], 3, {})
    np.testing.assert_allclose([token.log_prob for token in prompt.tokens], score.log_probs, atol=1e-6)
    explained = await mixer.explain_text(TOKENS[:30], knn(), passages=2)
    np.testing.assert_allclose(explained.log_probs, score.log_probs, rtol=1e-6)
    carried = explained.mixed.components[0].evidence.carried
    assert not any(carriers for carriers, weight in zip(carried, score.weight, strict=True) if not weight)


async def test_completions_skip_too() -> None:
    below = await half()
    skipped: list[int] = []
    store = BruteForce(tuning=tuned(below))
    mixer = Mixer(Lm(), JoinedSearches(store), TOY.info, skipped=skipped.append)
    options = GenerationOptions(max_tokens=12, sampling=SamplingOptions(temperature=0))
    made = await Generator(mixer, TOY.tokenizer).complete(TOKENS[:5], options, {"knn": knn()}, seed=0)
    assert searched(store) + sum(skipped) == len(made.tokens)
    assert sum(skipped) > 0
    plain = Mixer(Lm(), BruteForce(tuning=tuned(below)), TOY.info)
    for i in range(len(made.tokens)):
        context = np.concatenate([TOKENS[:5], np.array(made.tokens[:i], np.int32)])
        row = (await plain.next_token([context], knn())).mixed.log_probs[0]
        assert int(row.argmax()) == made.tokens[i]


async def test_where_nothing_is_wanted_the_datastore_is_not_asked() -> None:
    class Down(BruteForce):
        async def search(self, request: SearchRequest) -> SearchResult:
            raise Unavailable(f"{request.domain} is down")

    for options in (knn(), KnnOptions((DomainOptions("toy"), DomainOptions("toy2")))):
        mixer = Mixer(Lm(), Down(tuning=tuned(0.999)), TOY.info)
        score = await mixer.score_text(TOKENS, options)
        np.testing.assert_array_equal(score.log_probs, score.lm_log_probs.astype(np.float64))
        answer = await mixer.next_token([TOKENS[:9]], options, passages=2)
        np.testing.assert_array_equal(answer.mixed.weight, [0])
        explained = await mixer.explain_text(TOKENS, options)
        assert not explained.documents
    with pytest.raises(Unavailable):
        await Mixer(Lm(), Down(tuning=tuned(0.0)), TOY.info).score_text(TOKENS, knn())
