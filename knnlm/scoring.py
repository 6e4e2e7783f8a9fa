"""A text of any length, scored: its windows in batches, and the model, the search and the mixing at work on several.

The flow around it, which version of a domain is used and what happens when that is gone, is in mixer.py.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from knnlm.decoding import Mixed, Retrieved, Window, mix_targets
from knnlm.domains import UsedDomain
from knnlm.errors import DeadlineExceeded, Unavailable
from knnlm.messages import ForwardRequest, ForwardResult, SearchResult
from knnlm.options import KnnOptions

__all__ = ["BATCHES_UNDER_WAY", "Score", "Scoring", "given", "retrieved", "timed"]

T = TypeVar("T")
Timings = dict[str, float]
Forward = Callable[[ForwardRequest, Timings], Awaitable[ForwardResult]]
Search = Callable[[Sequence[UsedDomain], npt.NDArray[np.floating]], Awaitable[Sequence[SearchResult]]]

BATCHES_UNDER_WAY = 4  # of one text that is scored


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


class Scoring:
    """What the batches of one text share. used: empty when the LM alone is to answer; degraded: why.

    At the model and in the search one batch is at work, and one behind it so that it need not wait for the way there
    and back; BATCHES_UNDER_WAY are under way at most, whose keys and neighbors are held.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.int32],
        used: Sequence[UsedDomain],
        knn: KnnOptions | None,
        degraded: str | None,
        *,
        forward: Forward,
        search: Search,
    ) -> None:
        self._tokens = tokens
        self._used = used
        self._knn = knn
        self._degraded = degraded
        self._forward = forward
        self._search = search
        self._timings: Timings = {}
        self._at_model = asyncio.Semaphore(2)
        self._at_search = asyncio.Semaphore(2)
        self._room = asyncio.Semaphore(BATCHES_UNDER_WAY)

    async def run(self, windows: Sequence[Window], batch_tokens: int) -> Score:
        """Raises what forward and search raise; no work is left behind then."""
        tasks = [asyncio.ensure_future(self._batch(batch)) for batch in _batches(windows, batch_tokens)]
        try:
            parts = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        used = self._used
        if self._degraded is not None:
            used, parts = [], [_lm_part(part) for part in parts]
        knn_parts = [p.knn_log_probs for p in parts if p.knn_log_probs is not None]
        return Score(
            tokens=self._tokens,
            log_probs=np.concatenate([p.log_probs for p in parts]),
            lm_log_probs=np.concatenate([p.lm_log_probs for p in parts]),
            knn_log_probs=np.concatenate(knn_parts) if used else None,
            weight=np.concatenate([p.weight for p in parts]),
            domains=used,
            degraded=self._degraded,
            timings=self._timings,
        )

    async def _batch(self, windows: Sequence[Window]) -> Mixed:
        """One batch of windows; several are on their way at a time, each in another stage."""
        tokens, timings = self._tokens, self._timings
        targets = np.concatenate([tokens[w.first : w.end] for w in windows])
        async with self._room:
            async with self._at_model:
                request = ForwardRequest(
                    tokens=[w.fed(tokens) for w in windows],
                    positions=[w.positions for w in windows],
                    targets=targets,
                    keys=bool(self._used),
                )
                forward = await self._forward(request, timings)
            async with self._at_search:
                found = await self._neighbors(forward)
            begin = time.perf_counter()
            combine = self._knn.combine if self._knn else "mixture"
            lm_log_probs = given(forward.target_log_probs)
            mixed = await asyncio.to_thread(mix_targets, lm_log_probs, targets, found, combine=combine)
            timings["mix"] = timings.get("mix", 0.0) + time.perf_counter() - begin
            return mixed

    async def _neighbors(self, forward: ForwardResult) -> list[Retrieved]:
        """None once retrieval has failed and the LM alone may answer."""
        if self._knn is None or not self._used or self._degraded is not None:
            return []
        try:
            found = await timed(self._search(self._used, given(forward.keys)), "search", self._timings)
        except (Unavailable, DeadlineExceeded) as err:
            if self._knn.on_datastore_error != "lm_only":
                raise
            self._degraded = err.message
            return []
        return retrieved(found, self._used, self._knn.rule)


def retrieved(found: Sequence[SearchResult], used: Sequence[UsedDomain], rule: str) -> list[Retrieved]:
    """What was found, as what is mixed."""
    return [
        Retrieved(u.domain, result.neighbors, u.temperature, u.lmbda, rule)
        for result, u in zip(found, used, strict=True)
    ]


def given(value: T | None) -> T:
    """A field that the request asked for. A service that leaves it out broke the protocol."""
    if value is None:
        raise Unavailable("the language model service did not answer what it was asked for")
    return value


async def timed(call: Awaitable[T], stage: str, timings: Timings) -> T:
    """Await, and add the seconds it took to timings[stage]."""
    begin = time.perf_counter()
    try:
        return await call
    finally:
        timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - begin


def _batches(windows: Sequence[Window], batch_tokens: int) -> list[list[Window]]:
    """Consecutive windows of at most `batch_tokens` tokens together, never fewer than one."""
    batches: list[list[Window]] = [[]]
    size = 0
    for window in windows:
        size += len(window)
        if batches[-1] and size > batch_tokens:
            batches.append([])
            size = len(window)
        batches[-1].append(window)
    return batches


def _lm_part(part: Mixed) -> Mixed:
    """What was mixed before retrieval failed, as the LM alone: one answer never mixes two ways of making it."""
    return mix_targets(part.lm_log_probs, np.zeros(len(part.lm_log_probs), np.int32), [])
