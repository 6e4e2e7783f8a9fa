"""A long text scored in windows, several batches of them on their way at a time. Which sources are asked is in the plan
(knnlm/mixer.py), what is computed in decoding.py."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from knnlm.attribution import DocumentShare, document_shares
from knnlm.decoding import Mixed, Share, Window, mix_evidence
from knnlm.evidence import Evidence, Step, Stretch
from knnlm.messages import ForwardRequest, ForwardResult, required
from knnlm.sources import Plan, Timings, UsedDomain, UsedMemory, timed

BATCHES_UNDER_WAY = 4  # batches of one scored text that are held at a time
NOTHING_ELSE = Step(())


@dataclass(frozen=True)
class Score:
    """tokens: (t,) int32. mixed: (t - first,) about tokens[first:], natural logarithms. context_length, min_context: of
    the windows it was scored in."""

    tokens: npt.NDArray[np.int32]
    mixed: Mixed
    context_length: int
    min_context: int
    first: int = 1
    domains: Sequence[UsedDomain] = ()
    memories: Sequence[UsedMemory] = ()
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
        """(n,) log p_kNN; None without retrieval."""
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

    @property
    def lm_total(self) -> float:
        return float(self.lm_log_probs.sum(dtype=np.float64))

    @property
    def lm_perplexity(self) -> float:
        """What `perplexity` would be of the LM alone."""
        return float(np.exp(-self.lm_total / len(self.lm_log_probs)))

    @property
    def documents(self) -> list[DocumentShare]:
        """What the tokens lean on, as far as their carriers were asked for; see `document_shares`."""
        return document_shares([(s.weight, s.evidence.of_targets, s.evidence.carried) for s in self.mixed.components])


class Scoring:
    """What the batches of one text share.

    forward: asks the model. answers: asks the sources of a plan, and gives the plan it ends with, which has none once
    they failed and the LM alone may answer. At the model and at the sources one batch is at work, and one behind it so
    that it need not wait for the way there and back; BATCHES_UNDER_WAY are under way at most, whose keys and evidence
    are held. One alone where a source needs the text in order. asked: what each step asks for beside the targets.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.int32],
        plan: Plan,
        *,
        forward: Callable[[ForwardRequest, Timings], Awaitable[ForwardResult]],
        answers: Callable[[Plan, Step, Timings], Awaitable[tuple[Plan, list[Evidence]]]],
        asked: Step = NOTHING_ELSE,
    ) -> None:
        self.plan = plan
        self.timings: Timings = {}
        self._tokens = tokens
        self._forward = forward
        self._answers = answers
        self._asked = asked
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
            parts = [mix_evidence(part.lm_log_probs) for part in parts]
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
            async with self._at_sources:
                stretches = [
                    Stretch(tokens, w.start, np.arange(w.first, w.end), self._state, bos=w.bos) for w in windows
                ]
                step = replace(
                    self._asked,
                    stretches=stretches,
                    keys=forward.keys,
                    targets=targets,
                    statistics=forward.statistics,
                )
                after, answers = await self._answers(self.plan, step, timings)
                if after.degraded is not None:
                    self.plan = after
            mixing = asyncio.to_thread(
                mix_evidence, required(forward.target_log_probs), after.sources, answers, forward.statistics
            )
            return await timed(mixing, "mix", timings)


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
            np.concatenate([s.evidence.present for s in shares]),
            np.concatenate([s.evidence.of_targets for s in shares]),
            carried=[carriers for s in shares for carriers in s.evidence.carried],
            skipped=np.concatenate([s.evidence.skipped for s in shares]),
        )
        components.append(Share(shares[0].name, shares[0].kind, np.concatenate([s.weight for s in shares]), evidence))
    return Mixed(
        np.concatenate([part.log_probs for part in parts]),
        np.concatenate([part.lm_log_probs for part in parts]),
        components,
    )
