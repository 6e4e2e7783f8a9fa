"""One kNN-LM call from token ids to mixed distributions: forward, search, mix.

The flow is written once over the Protocols of messages.py. The aggregator runs it over gRPC clients, knnlm.pipeline
over objects in the same process, so that server and library cannot drift apart. All maths is in decoding.py, the work
on a long text in scoring.py.

A call asks once which version of each domain answers, and every search of it pins that version: one answer never mixes
two. Replicas may let go of it meanwhile; then the call begins again with the version that answers now, once.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from knnlm.decoding import Mixed, choose_windows, mix_distributions, plan_fed_windows
from knnlm.domains import UsedDomain, used_domain
from knnlm.errors import DeadlineExceeded, InvalidRequest, TooLarge, Unavailable, UnknownVersion
from knnlm.messages import (
    DatastoreClient,
    ForwardRequest,
    ForwardResult,
    LanguageModelClient,
    ModelInfo,
    SearchRequest,
    SearchResult,
)
from knnlm.options import KnnOptions
from knnlm.scoring import BATCHES_UNDER_WAY, Score, Scoring, given, retrieved, timed

__all__ = ["BATCHES_UNDER_WAY", "Mixer", "NextTokens", "Score"]

T = TypeVar("T")


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


class Mixer:
    """`info` is the model behind `lm`: domains made by another model, tokenizer or key function are refused.

    down: why retrieval is known not to answer now, None when it may. Who asked for `lm_only` then gets it at once.
    """

    def __init__(
        self,
        lm: LanguageModelClient,
        datastore: DatastoreClient | None,
        info: ModelInfo,
        *,
        batch_tokens: int = 4096,
        down: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.info = info
        self._lm = lm
        self._datastore = datastore
        self._batch_tokens = batch_tokens
        self._down = down

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
        degraded = self._known_down(knn)
        request = ForwardRequest(
            tokens=contexts,
            positions=[np.array([len(c) - 1], np.int32) for c in contexts],
            full=True,
            keys=knn is not None and degraded is None,
        )
        if knn is None or degraded is not None:
            forward = await self._forward(request, timings)
            mixed = mix_distributions(given(forward.log_probs), [])
            return NextTokens(mixed, degraded=degraded, timings=timings)
        outcome, used = await asyncio.gather(
            self._forward(request, timings), self._resolve(knn), return_exceptions=True
        )
        forward = _raised(outcome)
        log_probs = given(forward.log_probs)

        async def search(domains: Sequence[UsedDomain]) -> list[SearchResult]:
            keys = given(forward.keys)
            return await timed(
                self._search(domains, keys, passages=passages, passage_tokens=passage_tokens), "search", timings
            )

        try:
            domains = _raised(used)
            try:
                found = await search(domains)
            except UnknownVersion:
                if _all_pinned(knn):
                    raise
                domains = await self._resolve(knn)
                found = await search(domains)
        except (Unavailable, DeadlineExceeded) as err:
            if knn.on_datastore_error != "lm_only":
                raise
            return NextTokens(mix_distributions(log_probs, []), degraded=err.message, timings=timings)
        begin = time.perf_counter()
        mixed = mix_distributions(log_probs, retrieved(found, domains, knn.rule), combine=knn.combine)
        timings["mix"] = time.perf_counter() - begin
        return NextTokens(mixed, domains, found, timings=timings)

    async def score(
        self,
        tokens: npt.NDArray[np.int32],
        knn: KnnOptions | None = None,
        *,
        context_length: int | None = None,
        min_context: int | None = None,
    ) -> Score:
        """Log-probability of every token but the first of a text of any length, a (t,) int32 array with its BOS.

        context_length, min_context: see `choose_windows`. Model, search and mixing work at the same time, on different
        batches of windows: `timings` say how long each was waited for, and add up to more than the call took.
        """
        if len(tokens) < 2:
            raise InvalidRequest(f"nothing to score: expected at least 2 tokens, got {len(tokens)}", param="text")
        chosen = choose_windows(self.info, (), context_length, min_context)
        used, degraded = await self._resolve_or_degrade(knn)
        windows = plan_fed_windows(len(tokens), *chosen, used[0].window_bos if used else None)
        try:
            return await self._scoring(tokens, used, knn, degraded).run(windows, self._batch_tokens)
        except UnknownVersion:
            if knn is None or _all_pinned(knn):
                raise
            used, degraded = await self._resolve_or_degrade(knn)
            return await self._scoring(tokens, used, knn, degraded).run(windows, self._batch_tokens)

    def _scoring(
        self, tokens: npt.NDArray[np.int32], used: Sequence[UsedDomain], knn: KnnOptions | None, degraded: str | None
    ) -> Scoring:
        return Scoring(tokens, used, knn, degraded, forward=self._forward, search=self._search)

    async def _forward(self, request: ForwardRequest, timings: dict[str, float]) -> ForwardResult:
        """Raises Unavailable when another model than `info` answers: its keys would find nonsense without a word."""
        result = await timed(self._lm.forward(request), "lm", timings)
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
        return [
            used_domain(options, knn.search, info, self.info) for options, info in zip(knn.domains, infos, strict=True)
        ]

    def _known_down(self, knn: KnnOptions | None) -> str | None:
        """Why the LM alone is to answer without retrieval being asked at all."""
        return self._down() if knn is not None and knn.on_datastore_error == "lm_only" else None

    async def _resolve_or_degrade(self, knn: KnnOptions | None) -> tuple[list[UsedDomain], str | None]:
        degraded = self._known_down(knn)
        if knn is None or degraded is not None:
            return [], degraded
        try:
            return await self._resolve(knn), None
        except (Unavailable, DeadlineExceeded) as err:
            if knn.on_datastore_error != "lm_only":
                raise
            return [], err.message

    async def _search(
        self,
        domains: Sequence[UsedDomain],
        keys: npt.NDArray[np.floating],
        *,
        passages: int = 0,
        passage_tokens: int = 24,
    ) -> list[SearchResult]:
        if self._datastore is None:
            raise Unavailable("no datastore service is configured, so no domain can be used")
        return await asyncio.gather(
            *(
                self._datastore.search(
                    SearchRequest(d.domain, keys, d.search, d.version, passages=passages, passage_tokens=passage_tokens)
                )
                for d in domains
            )
        )


def _all_pinned(knn: KnnOptions) -> bool:
    """Whether the caller chose every version, so that none can have been switched under the call."""
    return all(domain.version is not None for domain in knn.domains)


def _raised(value: T | BaseException) -> T:
    if isinstance(value, BaseException):
        raise value
    return value
