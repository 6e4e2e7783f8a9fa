"""Versions that are switched, and let go, while a call is under way: an answer is of one of them, or begins again."""

import numpy as np
import pytest

from knnlm.decoding import plan_windows
from knnlm.errors import Unavailable, UnknownVersion
from knnlm.messages import DomainInfo, SearchRequest, SearchResult
from knnlm.mixer import Mixer, NextTokens
from knnlm.options import DomainOptions, KnnOptions
from knnlm.scoring import Score
from tests.test_mixer import TEXT, TOY, BruteForce, Lm, knn, run

TOKENS = TOY.tokenizer.encode(TEXT)
LONG = TOY.tokenizer.encode(4 * TEXT)


class Switches(BruteForce):
    """After `after` searches the domain is switched to v2, and v1 let go at once. Keeps every version it answered."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after
        self.answered: list[str] = []

    async def search(self, request: SearchRequest) -> SearchResult:
        if len(self.answered) >= self.after:
            self.current = "v2"
            self.values.pop("v1", None)
        result = await super().search(request)
        self.answered.append(result.version)
        return result


async def ask(mixer: Mixer, call: str, options: KnnOptions) -> NextTokens | Score:
    if call == "score":
        return await mixer.score_text(TOKENS[:20], options)
    return await mixer.next_token([TOKENS[:9]], options)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_score_whose_version_is_let_go_is_made_once_more_from_the_next(after: int) -> None:
    store = Switches(after)
    mixer = Mixer(Lm(), store, TOY.info, batch_tokens=1)
    score = run(mixer.score_text(LONG, knn(), min_context=4))
    assert [used.version for used in score.domains] == ["v2"]
    batches = len(plan_windows(len(LONG), TOY.info.context_length, 4))
    assert store.answered.count("v1") >= after
    assert store.answered[store.answered.count("v1") :] == ["v2"] * batches  # all of it anew, and nothing of v1 since
    expected = run(Mixer(Lm(), store, TOY.info, batch_tokens=1).score_text(LONG, knn(), min_context=4))
    np.testing.assert_array_equal(score.log_probs, expected.log_probs)


def test_a_next_token_whose_version_is_let_go_is_made_once_more_from_the_next() -> None:
    store, lm = Switches(0), Lm()
    contexts = [TOKENS[:9]]
    answer = run(Mixer(lm, store, TOY.info).next_token(contexts, knn()))
    assert [used.version for used in answer.domains] == [result.version for result in answer.found] == ["v2"]
    assert answer.domains[0].lmbda == 0.1  # the tuning of the version that answered
    expected = run(Mixer(Lm(), store, TOY.info).next_token(contexts, knn()))
    np.testing.assert_array_equal(answer.mixed.log_probs, expected.mixed.log_probs)
    assert lm.events == ["forward", "forward"]  # begun again with another plan


class OneOfTwo(Switches):
    """Only one of two domains is switched."""

    async def get_domain(self, domain: str, version: str | None = None) -> DomainInfo:
        return await super().get_domain(domain, version or ("v2" if domain == "toy2" else None))


def test_several_domains_are_all_asked_for_anew() -> None:
    store = OneOfTwo(2)
    options = KnnOptions((DomainOptions("toy1"), DomainOptions("toy2")))
    score = run(Mixer(Lm(), store, TOY.info, batch_tokens=1).score_text(TOKENS, options, min_context=4))
    assert [used.version for used in score.domains] == ["v2", "v2"]


@pytest.mark.parametrize("call", ["next_token", "score"])
def test_a_version_that_the_caller_pinned_is_not_replaced_by_another(call: str) -> None:
    store = Switches(0)
    mixer = Mixer(Lm(), store, TOY.info)
    with pytest.raises(UnknownVersion):
        run(ask(mixer, call, knn(version="v1")))
    assert store.answered == []
    assert len(store.asked) == 1


@pytest.mark.parametrize("call", ["next_token", "score"])
def test_a_version_that_is_gone_again_is_an_error(call: str) -> None:
    """It begins again once, not for ever."""

    class Gone(BruteForce):
        async def search(self, request: SearchRequest) -> SearchResult:
            self.asked.append(request)
            raise UnknownVersion("gone")

    store = Gone()
    mixer = Mixer(Lm(), store, TOY.info)
    with pytest.raises(UnknownVersion, match="gone"):
        run(ask(mixer, call, knn()))
    assert len(store.asked) == 2


@pytest.mark.parametrize("call", ["next_token", "score"])
def test_what_is_known_to_be_down_is_asked_by_nobody_who_can_do_without(call: str) -> None:
    store, problem = BruteForce(), "nobody is there"
    reasons: list[str | None] = [problem]
    mixer = Mixer(Lm(), store, TOY.info, down=lambda _kind, _options: reasons[0])
    lm_only = knn(on_datastore_error="lm_only")
    assert run(ask(mixer, call, lm_only)).degraded == problem
    assert store.asked == []
    assert run(ask(mixer, call, knn())).degraded is None  # who cannot do without asks nevertheless
    assert len(store.asked) == 1
    reasons[0] = None
    assert run(ask(mixer, call, lm_only)).degraded is None


@pytest.mark.parametrize("call", ["next_token", "score"])
def test_a_datastore_that_goes_while_the_call_begins_again_leaves_the_lm(call: str) -> None:
    class Goes(Switches):
        async def get_domain(self, domain: str, version: str | None = None) -> DomainInfo:
            if self.current == "v2":
                raise Unavailable("gone")
            return await super().get_domain(domain, version)

    mixer = Mixer(Lm(), Goes(0), TOY.info)
    answer = run(ask(mixer, call, knn(on_datastore_error="lm_only")))
    assert (answer.degraded, list(answer.domains)) == ("gone", [])
    if isinstance(answer, Score):
        np.testing.assert_array_equal(answer.log_probs, answer.lm_log_probs)
    else:
        np.testing.assert_array_equal(answer.mixed.log_probs, answer.mixed.lm_log_probs)
