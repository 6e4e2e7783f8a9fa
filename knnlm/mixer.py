"""One kNN-LM call from token ids to mixed distributions: forward, search, mix.

The flow is written once over the Protocols of messages.py. The aggregator runs it over gRPC clients, knnlm.pipeline
over objects in the same process, so that server and library cannot drift apart. All maths is in decoding.py.
"""

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from knnlm.decoding import Mixed, Retrieved, Window, mix_distributions, mix_targets, plan_windows
from knnlm.errors import DeadlineExceeded, InvalidRequest, TooLarge, Unavailable
from knnlm.messages import (
    DatastoreClient,
    ForwardRequest,
    ForwardResult,
    LanguageModelClient,
    ModelInfo,
    SearchRequest,
    SearchResult,
)
from knnlm.options import KnnOptions, UsedDomain, used_domain

__all__ = ["Mixer", "NextTokens", "Score"]

T = TypeVar("T")

BATCHES_UNDER_WAY = 4  # of one text that is scored


@dataclass(frozen=True)
class NextTokens:
    """mixed: (n, V) distributions of the next token of n contexts. found: one SearchResult per used domain.

    degraded: why the answer comes from the LM alone, None when it is as asked. timings: seconds per stage.
    """

    mixed: Mixed
    domains: Sequence[UsedDomain] = ()
    found: Sequence[SearchResult] = ()
    degraded: str | None = None
    timings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """tokens: (t,) int32. The rest is (t - 1,), about tokens[1:]; natural logarithms.

    knn_log_probs: None without retrieval. weight: what retrieval weighed at each token.
    """

    tokens: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float64]
    lm_log_probs: npt.NDArray[np.floating]
    knn_log_probs: npt.NDArray[np.float64] | None
    weight: npt.NDArray[np.float64]
    domains: Sequence[UsedDomain] = ()
    degraded: str | None = None
    timings: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return float(self.log_probs.sum())

    @property
    def perplexity(self) -> float:
        """Per token of this tokenizer: exp of the mean negative log-probability. inf where a token has none."""
        with np.errstate(over="ignore"):
            return float(np.exp(-self.log_probs.mean()))


@dataclass
class _Scoring:
    """What the batches of one text share. used: empty when the LM alone is to answer.

    model, search: one batch at work there, and one behind it so that it need not wait for the way there and back.
    room: batches under way, whose keys and neighbors are held.
    """

    tokens: npt.NDArray[np.int32]
    used: Sequence[UsedDomain]
    knn: KnnOptions | None
    degraded: str | None
    timings: dict[str, float] = field(default_factory=dict)
    model: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    search: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(BATCHES_UNDER_WAY))


class Mixer:
    """`info` is the model behind `lm`: domains made by another model, tokenizer or key function are refused."""

    def __init__(
        self,
        lm: LanguageModelClient,
        datastore: DatastoreClient | None,
        info: ModelInfo,
        *,
        batch_tokens: int = 4096,
    ) -> None:
        self.info = info
        self._lm = lm
        self._datastore = datastore
        self._batch_tokens = batch_tokens

    async def next_token(
        self,
        contexts: Sequence[npt.NDArray[np.int32]],
        knn: KnnOptions | None = None,
        *,
        passages: int = 0,
        passage_tokens: int = 24,
    ) -> NextTokens:
        """The distribution of the token after each context, a (t_i,) int32 array with its BOS.

        passages: also find the text around so many nearest neighbors of each context. Raises InvalidRequest for an
        empty or too long context and whatever the services raise.
        """
        for context in contexts:
            if not len(context):
                raise InvalidRequest("the context is empty: expected at least one token", param="tokens")
            if len(context) > self.info.context_length:
                raise TooLarge(
                    f"the context has {len(context)} tokens, the model takes {self.info.context_length}", param="text"
                )
        timings: dict[str, float] = {}
        request = ForwardRequest(
            tokens=contexts,
            positions=[np.array([len(c) - 1], np.int32) for c in contexts],
            full=True,
            keys=knn is not None,
        )
        if knn is None:
            forward = await self._forward(request, timings)
            return NextTokens(mix_distributions(_given(forward.log_probs), []), timings=timings)
        outcome, used = await asyncio.gather(
            self._forward(request, timings), self._resolve(knn), return_exceptions=True
        )
        forward = _raised(outcome)
        log_probs = _given(forward.log_probs)
        try:
            domains = _raised(used)
            found = await _timed(
                self._search(domains, knn, _given(forward.keys), passages=passages, passage_tokens=passage_tokens),
                "search",
                timings,
            )
        except (Unavailable, DeadlineExceeded) as err:
            if knn.on_datastore_error != "lm_only":
                raise
            return NextTokens(mix_distributions(log_probs, []), degraded=err.message, timings=timings)
        begin = time.perf_counter()
        mixed = mix_distributions(log_probs, _retrieved(found, domains, knn.rule), combine=knn.combine)
        timings["mix"] = time.perf_counter() - begin
        return NextTokens(mixed, domains, found, timings=timings)

    async def score(
        self,
        tokens: npt.NDArray[np.int32],
        knn: KnnOptions | None = None,
        *,
        min_context: int | None = None,
    ) -> Score:
        """Log-probability of every token but the first of a text of any length, a (t,) int32 array with its BOS.

        Windows as in evaluation and building: `min_context` tokens of context at least (half of the context length by
        default). Model, search and mixing work at the same time, on different batches of windows: `timings` say how
        long each was waited for, and add up to more than the call took.
        """
        if len(tokens) < 2:
            raise InvalidRequest(f"nothing to score: expected at least 2 tokens, got {len(tokens)}", param="text")
        context = self.info.context_length
        windows = plan_windows(len(tokens), context, context // 2 if min_context is None else min_context)
        used, degraded = await self._resolve_or_degrade(knn)
        scoring = _Scoring(tokens, used, knn, degraded=degraded)
        tasks = [asyncio.ensure_future(self._score(scoring, batch)) for batch in self._batches(windows)]
        try:
            parts = await asyncio.gather(*tasks)
        finally:  # after an error no work is left behind
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if scoring.degraded is not None:
            used, parts = [], [_lm_part(part) for part in parts]
        knn_parts = [p.knn_log_probs for p in parts if p.knn_log_probs is not None]
        return Score(
            tokens=tokens,
            log_probs=np.concatenate([p.log_probs for p in parts]),
            lm_log_probs=np.concatenate([p.lm_log_probs for p in parts]),
            knn_log_probs=np.concatenate(knn_parts) if used else None,
            weight=np.concatenate([p.weight for p in parts]),
            domains=used,
            degraded=scoring.degraded,
            timings=scoring.timings,
        )

    async def _score(self, scoring: "_Scoring", windows: Sequence[Window]) -> Mixed:
        """One batch of windows; several are on their way at a time, each in another stage."""
        targets = _targets(scoring.tokens, windows)
        knn, used, timings = scoring.knn, scoring.used, scoring.timings
        retrieved: list[Retrieved] = []
        async with scoring.room:
            async with scoring.model:
                request = ForwardRequest(
                    tokens=[scoring.tokens[w.start : w.end] for w in windows],
                    positions=[w.positions for w in windows],
                    targets=targets,
                    keys=bool(used),
                )
                forward = await self._forward(request, timings)
            async with scoring.search:
                if knn is not None and used and scoring.degraded is None:
                    try:
                        found = await _timed(self._search(used, knn, _given(forward.keys)), "search", timings)
                        retrieved = _retrieved(found, used, knn.rule)
                    except (Unavailable, DeadlineExceeded) as err:
                        if knn.on_datastore_error != "lm_only":
                            raise
                        scoring.degraded = err.message
            begin = time.perf_counter()
            combine = knn.combine if knn else "mixture"
            lm_log_probs = _given(forward.target_log_probs)
            mixed = await asyncio.to_thread(mix_targets, lm_log_probs, targets, retrieved, combine=combine)
            timings["mix"] = timings.get("mix", 0.0) + time.perf_counter() - begin
            return mixed

    def _batches(self, windows: Sequence[Window]) -> list[list[Window]]:
        """Consecutive windows of at most `batch_tokens` tokens together, never fewer than one."""
        batches: list[list[Window]] = [[]]
        size = 0
        for window in windows:
            size += window.end - window.start
            if batches[-1] and size > self._batch_tokens:
                batches.append([])
                size = window.end - window.start
            batches[-1].append(window)
        return batches

    async def _forward(self, request: ForwardRequest, timings: dict[str, float]) -> ForwardResult:
        """Raises Unavailable when another model than `info` answers: its keys would find nonsense without a word."""
        result = await _timed(self._lm.forward(request), "lm", timings)
        if result.fingerprint != self.info.fingerprint:
            raise Unavailable(
                f"the lm service answers with another model (fingerprint {result.fingerprint}) than "
                f"{self.info.model_id} ({self.info.fingerprint}), which it announced"
            )
        return result

    async def _resolve(self, knn: KnnOptions) -> list[UsedDomain]:
        """The version that each domain serves now and the values that hold for it: asked for, else its tuning's."""
        if self._datastore is None:
            raise Unavailable("no datastore service is configured, so no domain can be used")
        infos = await asyncio.gather(*(self._datastore.get_domain(d.domain, d.version) for d in knn.domains))
        return [used_domain(options, knn.k, info, self.info) for options, info in zip(knn.domains, infos, strict=True)]

    async def _resolve_or_degrade(self, knn: KnnOptions | None) -> tuple[list[UsedDomain], str | None]:
        if knn is None:
            return [], None
        try:
            return await self._resolve(knn), None
        except (Unavailable, DeadlineExceeded) as err:
            if knn.on_datastore_error != "lm_only":
                raise
            return [], err.message

    async def _search(
        self,
        domains: Sequence[UsedDomain],
        knn: KnnOptions,
        keys: npt.NDArray[np.floating],
        *,
        passages: int = 0,
        passage_tokens: int = 24,
    ) -> list[SearchResult]:
        if self._datastore is None:
            raise Unavailable("no datastore service is configured, so no domain can be used")
        request = SearchRequest(
            domain="",
            queries=keys,
            k=1,
            nprobe=knn.nprobe,
            ef_search=knn.ef_search,
            exclude_documents=knn.exclude_documents,
            rescore=knn.rescore,
            overfetch=knn.overfetch,
            passages=passages,
            passage_tokens=passage_tokens,
        )
        return await asyncio.gather(
            *(self._datastore.search(replace(request, domain=d.domain, version=d.version, k=d.k)) for d in domains)
        )


def _targets(tokens: npt.NDArray[np.int32], windows: Sequence[Window]) -> npt.NDArray[np.int32]:
    return np.concatenate([tokens[w.first : w.end] for w in windows])


def _retrieved(found: Sequence[SearchResult], used: Sequence[UsedDomain], rule: str) -> list[Retrieved]:
    return [
        Retrieved(u.domain, result.neighbors, u.temperature, u.lmbda, rule)
        for result, u in zip(found, used, strict=True)
    ]


def _lm_part(part: Mixed) -> Mixed:
    """What was mixed before retrieval failed, as the LM alone: one answer never mixes two ways of making it."""
    return mix_targets(part.lm_log_probs, np.zeros(len(part.lm_log_probs), np.int32), [])


def _given(value: T | None) -> T:
    """A field that the request asked for. A service that leaves it out broke the protocol."""
    if value is None:
        raise Unavailable("the language model service did not answer what it was asked for")
    return value


def _raised(value: T | BaseException) -> T:
    if isinstance(value, BaseException):
        raise value
    return value


async def _timed(call: Awaitable[T], stage: str, timings: dict[str, float]) -> T:
    """Await, and add the seconds it took to timings[stage]."""
    begin = time.perf_counter()
    try:
        return await call
    finally:
        timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - begin
