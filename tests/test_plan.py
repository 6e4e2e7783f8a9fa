"""A plan: everything that can be refused is refused before any work, and what it holds is used to the end."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from knnlm.decoding import mix_evidence
from knnlm.errors import DatastoreMismatch, InvalidRequest, KnnlmError, UnknownDomain, UnknownVersion
from knnlm.messages import DomainInfo, ForwardRequest, ForwardResult
from knnlm.mixer import Mixer
from knnlm.options import DomainOptions, KnnOptions
from knnlm.rules import LARGEST_LAMBDA
from knnlm.tuning_records import Tuning
from tests.test_mixer import TEXT, TOY, TUNING, BruteForce, Lm, knn
from tests.toys import COUNTS, LEVEL, CountOptions, CountSource, counts, level  # noqa: F401  fixtures

TOKENS = TOY.tokenizer.encode(TEXT)
CONTEXTS = [TOY.tokenizer.encode(text) for text in ("the cat", "a dog sat on")]


class Tuned(BruteForce):
    """Several domains, each with a tuning of its own."""

    def __init__(self, **tunings: Tuning) -> None:
        super().__init__()
        self.tunings = tunings

    async def get_domain(self, domain: str, version: str | None = None) -> DomainInfo:
        return replace(await super().get_domain(domain, version), tuning=self.tunings.get(domain, TUNING))


def domains(*names: str, **options: Any) -> KnnOptions:
    return KnnOptions(tuple(DomainOptions(name) for name in names), **options)


REFUSED: dict[str, tuple[KnnOptions, type[KnnlmError], str | None]] = {
    "unknown domain": (knn("law"), UnknownDomain, None),
    "unknown version": (knn(version="v9"), UnknownVersion, None),
    "unknown rule": (knn(rule="magic"), InvalidRequest, "rule"),
    "a rule it was not tuned for": (knn(rule=LEVEL), InvalidRequest, "rule"),
    "lambda with another rule": (knn(rule=LEVEL, lmbda=0.5), InvalidRequest, "lambda"),
    "lambdas above one": (
        KnnOptions((DomainOptions("toy1", lmbda=0.6), DomainOptions("toy2", lmbda=0.6))), InvalidRequest, "lambda",
    ),
    "a union of unequal ones": (
        KnnOptions((DomainOptions("toy1", lmbda=0.6), DomainOptions("toy2")), combine="union"),
        InvalidRequest, "combine",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("name", REFUSED)
async def test_what_can_be_refused_costs_no_forward_pass(name: str) -> None:
    options, error, param = REFUSED[name]
    lm, store = Lm(), BruteForce()
    mixer = Mixer(lm, store, TOY.info)
    for call in (mixer.next_token(CONTEXTS, options), mixer.score_text(TOKENS, options)):
        with pytest.raises(error) as caught:
            await call
        assert caught.value.param == param
    assert (lm.events, store.asked) == ([], [])


async def test_a_domain_of_another_model_costs_no_forward_pass() -> None:
    lm, store = Lm(), BruteForce()
    store.made_by = {"weights_sha256": "another"}
    with pytest.raises(DatastoreMismatch):
        await Mixer(lm, store, TOY.info).next_token(CONTEXTS, knn())
    assert lm.events == []


def test_an_unknown_way_to_combine_is_no_option() -> None:
    with pytest.raises(InvalidRequest, match="combine must be mixture or union, got 'sum'") as caught:
        knn(combine="sum")
    assert caught.value.param == "combine"


async def test_a_plan_is_pinned_for_as_many_steps_as_are_made_with_it() -> None:
    store = BruteForce()
    mixer = Mixer(Lm(), store, TOY.info)
    plan = await mixer.plan(knn())
    first = await mixer.step(plan, CONTEXTS)
    await store.activate("toy", "v2")
    second = await mixer.step(plan, CONTEXTS)
    scored = await mixer.score(plan, TOKENS)
    assert {request.version for request in store.asked} == {"v1"}
    np.testing.assert_array_equal(first.mixed.log_probs, second.mixed.log_probs)
    assert scored.domains == first.domains == plan.domains
    store.values.pop("v1")
    with pytest.raises(UnknownVersion):
        await mixer.step(plan, CONTEXTS)


async def test_domains_whose_fitted_lambdas_exceed_one_share_what_there_is() -> None:
    store = Tuned(toy1=replace(TUNING, lmbda=0.3), toy2=replace(TUNING, lmbda=0.8))
    answer = await Mixer(Lm(), store, TOY.info).next_token(CONTEXTS, domains("toy1", "toy2"))
    np.testing.assert_allclose(np.exp(answer.mixed.log_probs).sum(axis=1), 1)
    weights = [component.weight[0] for component in answer.mixed.components]
    np.testing.assert_allclose(weights, LARGEST_LAMBDA * np.array([0.3, 0.8]) / 1.1)


async def test_windows_are_those_of_the_domain_unless_others_are_asked_for() -> None:
    class Windowed(BruteForce):
        async def get_domain(self, domain: str, version: str | None = None) -> DomainInfo:
            return replace(await super().get_domain(domain, version), context_length=16, min_context=12)

    mixer = Mixer(Lm(), Windowed(), TOY.info)
    for options, asked, expected in (
        (knn(), {}, (16, 12)),
        (None, {}, (32, 16)),
        (knn(), {"context_length": 20, "min_context": 5}, (20, 5)),
    ):
        score = await mixer.score_text(TOKENS, options, **asked)
        assert (score.context_length, score.min_context) == expected
    bounded = Mixer(Lm(), Windowed(), TOY.info, max_window=8)
    assert (await bounded.score_text(TOKENS, knn())).context_length == 8
    with pytest.raises(InvalidRequest, match=r"context_length must lie in \[2, 8\]"):
        await bounded.score_text(TOKENS, knn(), context_length=9)


async def test_the_event_loop_runs_while_large_distributions_are_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixing waits for a task of the loop: on the loop's own thread it would wait for ever."""
    loop = asyncio.get_running_loop()

    def waiting(*given: Any) -> Any:
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(timeout=30)
        return mix_evidence(*given)

    monkeypatch.setattr("knnlm.sources.INLINE_NUMBERS", 2 * TOY.info.vocab_size - 1)
    monkeypatch.setattr("knnlm.mixer.mix_evidence", waiting)
    assert (await Mixer(Lm(), BruteForce(), TOY.info).next_token(CONTEXTS, knn())).degraded is None


@pytest.fixture
def level_tuning(level: None) -> Tuning:  # noqa: F811  the fixture
    return replace(TUNING, rule=LEVEL, parameters={"most": 0.5, "scale": 20.0})


async def test_a_rule_that_looks_at_the_lm_and_the_neighbors_is_used_as_it_was_tuned(level_tuning: Tuning) -> None:
    asked_of_lm: list[ForwardRequest] = []

    class Listening(Lm):
        async def forward(self, request: ForwardRequest) -> ForwardResult:
            asked_of_lm.append(request)
            return await super().forward(request)

    lm = Listening()
    mixer = Mixer(lm, BruteForce(tuning=level_tuning), TOY.info)
    answer = await mixer.next_token(CONTEXTS, knn())
    assert (answer.domains[0].rule, answer.domains[0].lmbda) == (LEVEL, None)
    weight = answer.mixed.weight
    assert 0 < weight[0] < 0.5
    assert weight[0] != weight[1]
    score = await mixer.score_text(CONTEXTS[1], knn())
    assert len(set(score.weight.tolist())) > 1
    assert all(request.statistics for request in asked_of_lm)
    fixed = await mixer.next_token(CONTEXTS, knn(rule="fixed"))
    np.testing.assert_array_equal(fixed.mixed.weight, 0.4)
    asked = await mixer.next_token(CONTEXTS, knn(lmbda=0.1))
    np.testing.assert_array_equal(asked.mixed.weight, 0.1)
    assert not asked_of_lm[-1].statistics


@pytest.mark.usefixtures("counts")
async def test_a_source_of_ones_own_is_mixed_beside_domains() -> None:
    mixer = Mixer(Lm(), BruteForce(), TOY.info)
    context = CONTEXTS[1]
    answer = await mixer.next_token([context], {"knn": knn(lmbda=0.3), COUNTS: CountOptions(0.2)})
    assert [(c.name, c.kind) for c in answer.mixed.components] == [("toy", "knn"), ("own text", COUNTS)]
    lm = np.exp(answer.mixed.lm_log_probs[0].astype(np.float64))
    neighbors = np.exp(answer.mixed.mean_row(0, "knn"))  # type: ignore[arg-type]  # there is one
    own = np.bincount(context, minlength=TOY.info.vocab_size) / len(context)
    np.testing.assert_allclose(np.exp(answer.mixed.log_probs[0]), 0.5 * lm + 0.3 * neighbors + 0.2 * own, rtol=1e-6)


@pytest.mark.usefixtures("counts")
async def test_a_source_that_needs_the_text_in_order_gets_it_so() -> None:
    mixer = Mixer(Lm(), BruteForce(), TOY.info, batch_tokens=1)
    plan = await mixer.plan({COUNTS: CountOptions(0.2)})
    score = await mixer.score(plan, np.tile(TOKENS, 4), min_context=4)
    (source,) = plan.sources
    assert isinstance(source, CountSource)
    assert len(source.seen) > 10
    assert source.seen == sorted(source.seen)
    tokens = score.tokens
    expected = [np.mean(tokens[:i] == tokens[i]) for i in range(1, len(tokens))]
    np.testing.assert_allclose(np.exp(score.mixed.components[0].evidence.of_targets), expected)
    np.testing.assert_allclose(
        np.exp(score.log_probs), 0.8 * np.exp(score.lm_log_probs.astype(np.float64)) + 0.2 * np.array(expected)
    )


async def test_an_unknown_source_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="unknown source 'magic'; known: knn"):
        await Mixer(Lm(), BruteForce(), TOY.info).plan({"magic": None})


async def test_the_smallest_temperature_is_the_nearest_neighbor_alone() -> None:
    mixer = Mixer(Lm(), BruteForce(), TOY.info)
    answer = await mixer.next_token(CONTEXTS, knn(lmbda=0.5, temperature=1e-100))
    for i, found in enumerate(answer.found[0].neighbors.values[:, 0]):
        row = answer.mixed.mean_row(i, "knn")
        assert row is not None
        assert row[found] == 0.0
    assert np.isfinite(answer.mixed.log_probs).all()
    with pytest.raises(InvalidRequest, match="temperature must be > 0"):
        knn(temperature=1e-320)
