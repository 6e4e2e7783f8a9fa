"""The flow of a kNN-LM call, with a toy model and a datastore that searches by brute force."""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest

from knnlm.decoding import plan_windows
from knnlm.errors import DatastoreMismatch, InvalidRequest, TooLarge, Unavailable, UnknownDomain, UnknownVersion
from knnlm.messages import (
    DomainInfo,
    ForwardRequest,
    ForwardResult,
    ModelInfo,
    Passage,
    PassagesRequest,
    SearchRequest,
    SearchResult,
)
from knnlm.mixer import Mixer
from knnlm.neighbors import Neighbors
from knnlm.options import SEARCH_OPTIONS, DomainOptions, KnnOptions, SearchOptions
from knnlm.scoring import BATCHES_UNDER_WAY
from knnlm.testing import ToyLanguageModel
from knnlm.tuning_records import Tuning

T = TypeVar("T")
TOY = ToyLanguageModel()
TEXT = "the cat sat on the mat and the dog sat on the log, and the cat saw that the dog sat on the mat."
TUNING = Tuning(temperature=3.0, lmbda=0.4, k=5, lm_perplexity=9.0, knn_perplexity=8.0, tokens=100, documents=2)


class Lm:
    """The toy model as a client, keeping a record of when it was asked."""

    def __init__(self, events: list[str] | None = None) -> None:
        self.events = [] if events is None else events

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        self.events.append("forward")
        await asyncio.sleep(0)
        return TOY.forward(request)

    async def get_model(self) -> ModelInfo:
        return TOY.info

    async def get_tokenizer(self) -> str:
        return TOY.tokenizer.json

    async def get_chat_template(self) -> str | None:
        return None


class BruteForce:
    """One domain, versions "v1" and "v2" that store different tokens; every search is written down."""

    def __init__(self, tuning: Tuning | None = TUNING, events: list[str] | None = None) -> None:
        rng = np.random.default_rng(0)
        self.keys = rng.standard_normal((40, TOY.info.key_dim)).astype(np.float32)
        self.values = {v: rng.integers(2, 200, 40).astype(np.int32) for v in ("v1", "v2")}
        self.current = "v1"
        self.tuning = tuning
        self.asked: list[SearchRequest] = []
        self.down: Exception | None = None
        self.events = [] if events is None else events
        self.made_by: dict[str, str] = {}

    async def search(self, request: SearchRequest) -> SearchResult:
        self.events.append("search")
        for _ in range(5):
            await asyncio.sleep(0)
        self.asked.append(request)
        if self.down is not None:
            raise self.down
        version = request.version or self.current
        if version not in self.values:
            raise UnknownVersion(f"no {version}")
        difference = request.queries[:, None].astype(np.float64) - self.keys[None]
        distances = (difference**2).sum(axis=2)
        order = np.argsort(distances, axis=1, kind="stable")[:, : request.k]
        neighbors = Neighbors(
            np.take_along_axis(distances, order, axis=1).astype(np.float32),
            self.values[version][order],
            order if request.ids else None,
        )
        return SearchResult(request.domain, version, neighbors)

    async def passages(self, request: PassagesRequest) -> Sequence[Passage]:
        """Documents of 10 entries each, without text around them."""
        self.events.append("passages")
        values, none = self.values[request.version], np.empty(0, np.int32)
        return [Passage(f"{e // 10}", e, e % 10 + 1, none, values[e : e + 1]) for e in request.entries.tolist()]

    async def list_domains(self) -> Sequence[DomainInfo]:
        return [await self.get_domain("toy")]

    async def get_domain(self, domain: str, version: str | None = None) -> DomainInfo:
        version = version or self.current
        if version not in self.values:
            raise UnknownVersion(f"no {version}")
        if not domain.startswith("toy"):
            raise UnknownDomain(f"unknown domain {domain}")
        info = TOY.info
        return replace(
            DomainInfo(
                domain=domain,
                version=version,
                versions=["v1", "v2"],
                state="ready",
                entries=40,
                documents=1,
                key_dim=info.key_dim,
                key_dtype="float32",
                key_function=info.key_function,
                index="flat",
                model_id=info.model_id,
                weights_sha256=info.weights_sha256,
                tokenizer_sha256=info.tokenizer_sha256,
                tuning=self.tuning if version == "v1" or self.tuning is None else replace(self.tuning, lmbda=0.1),
            ),
            **self.made_by,  # type: ignore[arg-type]  # names of fields that hold text
        )

    async def activate(self, domain: str, version: str) -> DomainInfo:
        self.current = version
        return await self.get_domain(domain)


def run(call: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(call)


def knn(domain: str = "toy", **options: Any) -> KnnOptions:
    one = {name: options.pop(name) for name in ("version", "lmbda", "temperature") if name in options}
    search = {name: options.pop(name) for name in list(options) if name in SEARCH_OPTIONS}
    return KnnOptions((DomainOptions(domain, **one),), SearchOptions(**search), **options)


def by_hand(store: BruteForce, context: np.ndarray, temperature: float, lmbda: float, k: int) -> np.ndarray:
    """p(w) of the last position, in probability space."""
    request = ForwardRequest([context], [np.array([len(context) - 1], np.int32)], full=True, keys=True)
    forward = TOY.forward(request)
    assert forward.keys is not None
    assert forward.log_probs is not None
    distances = ((forward.keys[0].astype(np.float64) - store.keys) ** 2).sum(axis=1).astype(np.float32)
    p_knn = np.zeros(TOY.info.vocab_size)
    nearest = np.argsort(distances, kind="stable")[:k]
    weights = np.exp(-(distances[nearest].astype(np.float64) - distances.min()) / temperature)
    np.add.at(p_knn, store.values["v1"][nearest], weights / weights.sum())
    mixed: np.ndarray = (1 - lmbda) * np.exp(forward.log_probs[0].astype(np.float64)) + lmbda * p_knn
    return mixed


@pytest.mark.parametrize("lmbda", [0.0, 0.3, 1.0])
def test_next_token_equals_the_formula(lmbda: float) -> None:
    store = BruteForce()
    contexts = [TOY.tokenizer.encode(t) for t in ("the cat", "a dog sat on")]
    answer = run(Mixer(Lm(), store, TOY.info).next_token(contexts, knn(lmbda=lmbda, temperature=2.0, k=7)))
    for i, context in enumerate(contexts):
        np.testing.assert_allclose(np.exp(answer.mixed.log_probs[i]), by_hand(store, context, 2.0, lmbda, 7), rtol=1e-6)
    assert (answer.domains[0].version, answer.domains[0].k) == ("v1", 7)


def test_a_domain_and_nothing_else_uses_what_was_fitted() -> None:
    store = BruteForce()
    context = TOY.tokenizer.encode("the cat")
    answer = run(Mixer(Lm(), store, TOY.info).next_token([context], knn()))
    np.testing.assert_allclose(np.exp(answer.mixed.log_probs[0]), by_hand(store, context, 3.0, 0.4, 5), rtol=1e-6)


def test_a_pinned_version_is_mixed_with_its_own_tuning() -> None:
    mixer = Mixer(Lm(), BruteForce(), TOY.info)
    used = run(mixer.next_token([TOY.tokenizer.encode("the cat")], knn(version="v2"))).domains[0]
    assert (used.version, used.lmbda) == ("v2", 0.1)


def test_what_was_chosen_reaches_every_search() -> None:
    store = BruteForce()
    chosen: dict[str, Any] = {
        "nprobe": 3, "ef_search": 90, "rescore": False, "overfetch": 2.0, "exclude_documents": ("a", "b"),
    }  # fmt: skip
    mixer = Mixer(Lm(), store, TOY.info, batch_tokens=1)
    run(mixer.score_text(TOY.tokenizer.encode(TEXT), knn(**chosen), min_context=4))
    run(mixer.next_token([TOY.tokenizer.encode("the cat")], knn(**chosen)))
    assert len(store.asked) > 3
    for request in store.asked:
        assert {name: getattr(request.options, name) for name in chosen} == chosen


def test_without_tuning_the_missing_value_is_asked_for() -> None:
    mixer = Mixer(Lm(), BruteForce(tuning=None), TOY.info)
    context = [TOY.tokenizer.encode("the cat")]
    with pytest.raises(InvalidRequest, match=r"has not been tuned: give temperature"):
        run(mixer.next_token(context, knn(lmbda=0.5)))
    assert run(mixer.next_token(context, knn(lmbda=0.5, temperature=1.0))).domains[0].k == 1024


def test_no_retrieval_is_the_lm_exactly_and_asks_for_no_keys() -> None:
    tokens = TOY.tokenizer.encode(TEXT)
    score = run(Mixer(Lm(), None, TOY.info).score_text(tokens))
    np.testing.assert_array_equal(score.log_probs, score.lm_log_probs)
    assert score.knn_log_probs is None
    with pytest.raises(Unavailable, match="no datastore service"):
        run(Mixer(Lm(), None, TOY.info).score_text(tokens, knn()))


def test_scores_equal_next_token_probabilities() -> None:
    """Position by position, with the context that the position's window holds."""
    store, tokens = BruteForce(), TOY.tokenizer.encode(TEXT)
    mixer = Mixer(Lm(), store, TOY.info, batch_tokens=70)
    score = run(mixer.score_text(tokens, knn(), min_context=10))
    assert len(score.log_probs) == len(tokens) - 1
    for window in plan_windows(len(tokens), TOY.info.context_length, 10):
        contexts = [tokens[window.start : t] for t in range(window.first, window.end)]
        answer = run(mixer.next_token(contexts, knn()))
        rows = np.arange(len(contexts))
        expected = answer.mixed.log_probs[rows, tokens[window.first : window.end]]
        np.testing.assert_allclose(score.log_probs[window.first - 1 : window.end - 1], expected, rtol=1e-6)
    np.testing.assert_allclose(score.perplexity, np.exp(-score.total / len(score.log_probs)))


def test_one_call_never_mixes_versions() -> None:
    class SwitchesAfterTwo(BruteForce):
        async def search(self, request: SearchRequest) -> SearchResult:
            if len(self.asked) == 2:
                self.current = "v2"
            return await super().search(request)

    store, tokens = SwitchesAfterTwo(), TOY.tokenizer.encode(TEXT)
    mixer = Mixer(Lm(), store, TOY.info, batch_tokens=1)
    assert run(mixer.score_text(tokens, knn(), min_context=4)).domains[0].version == "v1"
    assert {request.version for request in store.asked} == {"v1"}
    assert len(store.asked) > 3
    assert run(mixer.score_text(tokens, knn())).domains[0].version == "v2"


def test_the_next_batch_is_in_the_model_while_this_one_is_searched() -> None:
    events: list[str] = []
    mixer = Mixer(Lm(events), BruteForce(events=events), TOY.info, batch_tokens=1)
    run(mixer.score_text(TOY.tokenizer.encode(TEXT), knn(), min_context=4))
    searches = [i for i, event in enumerate(events) if event == "search"]
    assert len(searches) > 3
    for number, i in enumerate(searches[:-2], start=1):
        before_the_next = events[: searches[number]]
        assert before_the_next.count("forward") >= number + 1, i


def test_a_model_that_was_replaced_behind_the_client_is_noticed() -> None:
    store = BruteForce()
    store.made_by = {"weights_sha256": "another"}
    mixer = Mixer(Lm(), store, replace(TOY.info, weights_sha256="another"))
    context = TOY.tokenizer.encode("the cat")
    for call in (mixer.next_token([context]), mixer.next_token([context], knn()), mixer.score_text(context)):
        with pytest.raises(Unavailable, match="the lm service answers with another model"):
            run(call)


def test_domains_of_another_model_are_refused_with_both_values() -> None:
    store = BruteForce()
    store.made_by = {"key_function": "ffn_input"}
    with pytest.raises(DatastoreMismatch, match=r"key_function ffn_input .* the language model has toy"):
        run(Mixer(Lm(), store, TOY.info).next_token([TOY.tokenizer.encode("a")], knn()))


@pytest.mark.parametrize("call", ["next_token", "score"])
def test_retrieval_down_fails_unless_lm_only_was_asked_for(call: str) -> None:
    store, tokens = BruteForce(), TOY.tokenizer.encode(TEXT)[: TOY.info.context_length]
    store.down = Unavailable("the datastore is away")
    mixer = Mixer(Lm(), store, TOY.info)

    async def ask(options: KnnOptions) -> tuple[np.ndarray, np.ndarray, str | None]:
        if call == "score":
            s = await mixer.score_text(tokens, options)
            return s.log_probs, s.lm_log_probs, s.degraded
        n = await mixer.next_token([tokens], options)
        return n.mixed.log_probs, n.mixed.lm_log_probs, n.degraded

    with pytest.raises(Unavailable, match="the datastore is away"):
        run(ask(knn()))
    mixed, lm, degraded = run(ask(knn(on_datastore_error="lm_only")))
    np.testing.assert_array_equal(mixed, lm)
    assert degraded == "the datastore is away"


def test_a_score_that_loses_retrieval_half_way_is_the_lm_all_the_way() -> None:
    store, tokens = BruteForce(), TOY.tokenizer.encode(TEXT)

    class Fails(BruteForce):
        async def search(self, request: SearchRequest) -> SearchResult:
            if len(self.asked) == 2:
                self.down = Unavailable("gone")
            return await super().search(request)

    store = Fails()
    score = run(Mixer(Lm(), store, TOY.info, batch_tokens=1).score_text(tokens, knn(on_datastore_error="lm_only")))
    assert score.degraded == "gone"
    assert score.knn_log_probs is None
    np.testing.assert_array_equal(score.log_probs, score.lm_log_probs)
    np.testing.assert_array_equal(score.weight, 0)


def test_few_batches_are_under_way_at_a_time() -> None:
    """However fast the model is: keys and neighbors of the batches under way are held."""
    events: list[str] = []
    mixer = Mixer(Lm(events), BruteForce(events=events), TOY.info, batch_tokens=1)
    run(mixer.score_text(TOY.tokenizer.encode(8 * TEXT), knn(), min_context=4))
    forwards = searches = 0
    for event in events:
        forwards, searches = forwards + (event == "forward"), searches + (event == "search")
        assert forwards - searches <= BATCHES_UNDER_WAY
    assert forwards == searches > 10


def test_nothing_is_left_running_after_an_error() -> None:
    class Refuses(BruteForce):
        async def search(self, request: SearchRequest) -> SearchResult:
            if len(self.asked) == 2:
                raise InvalidRequest("no more")
            return await super().search(request)

    async def call() -> int:
        with pytest.raises(InvalidRequest, match="no more"):
            await Mixer(Lm(), Refuses(), TOY.info, batch_tokens=1).score_text(TOY.tokenizer.encode(8 * TEXT), knn())
        return len(asyncio.all_tasks())

    assert run(call()) == 1


def test_bad_input_is_named() -> None:
    mixer = Mixer(Lm(), BruteForce(), TOY.info)
    with pytest.raises(InvalidRequest, match="the context is empty"):
        run(mixer.next_token([np.empty(0, np.int32)]))
    with pytest.raises(TooLarge, match="has 33 tokens, the model takes 32"):
        run(mixer.next_token([np.zeros(33, np.int32)]))
    with pytest.raises(InvalidRequest, match="at least 2 tokens, got 1"):
        run(mixer.score_text(np.zeros(1, np.int32)))
    with pytest.raises(UnknownDomain):
        run(mixer.next_token([np.zeros(3, np.int32)], knn("law")))
    with pytest.raises(UnknownVersion):
        run(mixer.next_token([np.zeros(3, np.int32)], knn(version="v9")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lmbda": 1.5}, r"lambda must lie in \[0, 1\], got 1\.5"),
        ({"temperature": 0.0}, r"temperature must be > 0, got 0\.0"),
        ({"temperature": float("nan")}, "temperature must be > 0"),
        ({"k": 0}, "k must be >= 1, got 0"),
        ({"exclude_documents": ("d",) * 1025}, "exclude_documents may name at most 1024 documents, got 1025"),
        ({"exclude_documents": ("d" * 4097,)}, "of at most 4096 characters, got one of 4097"),
        ({"on_datastore_error": "ignore"}, "on_datastore_error must be fail or lm_only, got 'ignore'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        knn(**options)
    with pytest.raises(InvalidRequest, match="distinct"):
        KnnOptions((DomainOptions("a"), DomainOptions("a")))
