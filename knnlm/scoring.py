"""A long text scored in windows, several batches of them on their way at a time. Which sources are asked is in the plan
(knnlm/mixer.py), what is computed in decoding.py."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from knnlm.decoding import Answered, Mixed, Share, Window, mix_evidence
from knnlm.domains import UsedDomain
from knnlm.errors import Unavailable
from knnlm.evidence import Evidence, LmStatistics, Step, Stretch
from knnlm.messages import ForwardRequest, ForwardResult
from knnlm.plan import Plan

__all__ = ["BATCHES_UNDER_WAY", "Score", "Scoring", "required", "statistics", "timed"]

T = TypeVar("T")
Timings = dict[str, float]

BATCHES_UNDER_WAY = 4  # of one text that is scored


@dataclass(frozen=True)
class Score:
    """tokens: (t,) int32. mixed: (t - 1,) about tokens[1:], natural logarithms. context_length, min_context: of the
    windows it was scored in."""

    tokens: npt.NDArray[np.int32]
    mixed: Mixed
    context_length: int
    min_context: int
    domains: Sequence[UsedDomain] = ()
    degraded: str | None = None
    timings: Mapping[str, float] = field(default_factory=dict)

    @property
    def log_probs(self) -> npt.NDArray[np.float64]:
        return self.mixed.log_probs

    @property
    def lm_log_probs(self) -> npt.NDArray[np.floating]:
        return self.mixed.lm_log_probs

    @property
    def knn_log_probs(self) -> npt.NDArray[np.float64] | None:
        """None without retrieval."""
        return self.mixed.knn_log_probs

    @property
    def weight(self) -> npt.NDArray[np.float64]:
        """What all components beside the LM weighed at each token."""
        return self.mixed.weight

    @property
    def total(self) -> float:
        return float(self.log_probs.sum())

    @property
    def perplexity(self) -> float:
        """Per token of this tokenizer: exp of the mean negative log-probability. inf where a token has none."""
        with np.errstate(over="ignore"):
            return float(np.exp(-self.log_probs.mean()))


class Scoring:
    """What the batches of one text share.

    forward: asks the model. answers: asks the sources of a plan, and gives the plan it ends with, which has none once
    they failed and the LM alone may answer. At the model and at the sources one batch is at work, and one behind it so
    that it need not wait for the way there and back; BATCHES_UNDER_WAY are under way at most, whose keys and evidence
    are held. One alone where a source needs the text in order.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.int32],
        plan: Plan,
        *,
        forward: Callable[[ForwardRequest, Timings], Awaitable[ForwardResult]],
        answers: Callable[[Plan, Step, Timings], Awaitable[tuple[Plan, list[Answered]]]],
    ) -> None:
        self.plan = plan
        self.timings: Timings = {}
        self._tokens = tokens
        self._forward = forward
        self._answers = answers
        self._state: dict[str, object] = {}
        self._at_model = asyncio.Semaphore(2)
        self._at_sources = asyncio.Semaphore(2)
        self._under_way = asyncio.Semaphore(1 if plan.in_order else BATCHES_UNDER_WAY)

    async def run(self, windows: Sequence[Window], batch_tokens: int) -> Mixed:
        """All windows in batches of at most `batch_tokens` tokens, or one window.

        Raises what forward and answers raise; no work is left behind then.
        """
        tasks = [asyncio.ensure_future(self._batch(batch)) for batch in _batches(windows, batch_tokens)]
        try:
            parts = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self.plan.degraded is not None:  # one answer never mixes two ways of making it
            parts = [mix_evidence(part.lm_log_probs, []) for part in parts]
        return _joined(parts)

    async def _batch(self, windows: Sequence[Window]) -> Mixed:
        """One batch of windows; several are on their way at a time, each in another stage."""
        tokens, timings, plan = self._tokens, self.timings, self.plan
        targets = np.concatenate([tokens[w.first : w.end] for w in windows])
        async with self._under_way:
            async with self._at_model:
                request = ForwardRequest(
                    tokens=[w.fed(tokens) for w in windows],
                    positions=[w.positions for w in windows],
                    targets=targets,
                    keys=plan.needs_keys,
                    statistics=plan.statistics,
                )
                forward = await self._forward(request, timings)
            answers: list[Answered] = []
            async with self._at_sources:
                if self.plan.sources:
                    stretches = [Stretch(tokens, w.start, np.arange(w.first, w.end), self._state) for w in windows]
                    after, answers = await self._answers(self.plan, Step(stretches, forward.keys, targets), timings)
                    if after.degraded is not None:
                        self.plan = after
            lm_log_probs = required(forward.target_log_probs)
            return await timed(
                asyncio.to_thread(mix_evidence, lm_log_probs, answers, statistics(forward)), "mix", timings
            )


def required(value: T | None) -> T:
    """A field that the request asked for. Raises Unavailable for a service that left it out: it broke the protocol."""
    if value is None:
        raise Unavailable("the language model service did not answer what it was asked for")
    return value


def statistics(forward: ForwardResult) -> LmStatistics | None:
    """Those of a forward pass that was asked for them."""
    if forward.entropy is None or forward.largest_log_prob is None:
        return None
    return LmStatistics(forward.entropy, forward.largest_log_prob)


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


def _joined(parts: Sequence[Mixed]) -> Mixed:
    """Mixtures of targets, one below the other."""
    components = []
    for shares in zip(*(part.components for part in parts), strict=True):
        evidence = Evidence(
            np.concatenate([s.evidence.present for s in shares]), np.concatenate([s.target_log_probs for s in shares])
        )
        components.append(Share(shares[0].name, shares[0].kind, np.concatenate([s.weight for s in shares]), evidence))
    return Mixed(
        np.concatenate([part.log_probs for part in parts]),
        np.concatenate([part.lm_log_probs for part in parts]),
        components,
    )
