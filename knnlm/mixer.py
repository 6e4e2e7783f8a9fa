"""The flow of a kNN-LM call: plan once, then step or score. Written once over the Protocols of messages.py.

The aggregator runs it over gRPC clients, knnlm.pipeline over objects in the same process, so that server and library
cannot drift apart. A plan asks once which version of each domain answers, and every search with it pins that version:
one answer never mixes two. Replicas may let go of it meanwhile; then the call is made again with a new plan, once.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from knnlm.decoding import Answered, Mixed, choose_windows, mix_evidence, plan_fed_windows
from knnlm.domains import NoDatastore, UsedDomain
from knnlm.errors import DeadlineExceeded, InvalidRequest, TooLarge, Unavailable, UnknownVersion
from knnlm.evidence import Step, Stretch
from knnlm.messages import (
    DatastoreClient,
    ForwardRequest,
    ForwardResult,
    LanguageModelClient,
    ModelInfo,
    SearchResult,
)
from knnlm.mixture import TOLERANCE
from knnlm.options import KnnOptions
from knnlm.plan import Plan
from knnlm.rules import FIXED
from knnlm.scoring import BATCHES_UNDER_WAY, Score, Scoring, required, statistics, timed
from knnlm.sources import Services, Source, computed, source_kind, together

__all__ = ["BATCHES_UNDER_WAY", "Mixer", "NextTokens", "Options", "Plan", "Score"]

T = TypeVar("T")
Ids = npt.NDArray[np.int32]
MAX_EXPECTED = 256  # kinds of options whose plans are remembered
Options = KnnOptions | Mapping[str, Any] | None  # Any: a record of options for each row of knnlm.sources.SOURCES


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


class Wanted(NamedTuple):
    """What a plan needs of a forward pass beside the distributions."""

    keys: bool
    statistics: bool


@dataclass(frozen=True)
class Begun:
    """A forward pass under way. timings: seconds per stage, when it is done."""

    wanted: Wanted
    forward: "asyncio.Future[ForwardResult]"
    timings: dict[str, float]

    async def stop(self) -> None:
        """Leave nothing running; what it would have raised is not."""
        if self.forward.cancel():
            await asyncio.gather(self.forward, return_exceptions=True)


class Mixer:
    """`info` is the model behind `lm`: domains made by another model, tokenizer or key function are refused.

    batch_tokens: of windows that are sent to the model at once. max_window: tokens of the longest window; None: what
    the model takes. down: why retrieval is known not to answer now, None when it may. Callers that can do without then
    do so at once.
    """

    def __init__(
        self,
        lm: LanguageModelClient,
        datastore: DatastoreClient | None,
        info: ModelInfo,
        *,
        batch_tokens: int = 4096,
        max_window: int | None = None,
        down: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.info = info
        self._lm = lm
        self._services = Services(info, datastore or NoDatastore())
        self._batch_tokens = batch_tokens
        self._window_model = replace(info, context_length=min(info.context_length, max_window or info.context_length))
        self._down = down
        self._expected: dict[tuple[object, ...] | None, Wanted] = {}

    async def plan(self, options: Options = None) -> Plan:
        """The sources that the options mean, resolved, pinned and checked; none for the LM alone.

        options: of one kind, or by kind. Nothing is asked of the model. Raises InvalidRequest for an unknown source or
        rule and for weights above one, what the kinds of sources raise, and Unavailable or DeadlineExceeded unless the
        LM alone may answer.
        """
        asked = {"knn": options} if isinstance(options, KnnOptions) else dict(options or {})
        kinds = {name: source_kind(name) for name in asked}
        optional = all(kind.optional(asked[name]) for name, kind in kinds.items())
        down = self._down() if asked and optional else None
        if down is not None:
            return Plan(degraded=down)
        try:
            found = await together([kind.resolve(asked[name], self._services) for name, kind in kinds.items()])
        except (Unavailable, DeadlineExceeded) as err:
            if not optional:
                raise
            return Plan(degraded=err.message)
        sources = tuple(source for resolved in found for source in resolved.sources)
        _check_weights(sources)
        return Plan(
            sources,
            domains=tuple(used for resolved in found for used in resolved.domains),
            infos=tuple(info for resolved in found for info in resolved.infos),
            pinned=all(resolved.pinned for resolved in found),
        )

    async def step(
        self,
        plan: Plan,
        contexts: Sequence[Ids],
        *,
        passages: int = 0,
        passage_tokens: int = 24,
        begun: Begun | None = None,
    ) -> NextTokens:
        """The distribution of the token after each context, a (t_i,) int32 array with its BOS.

        passages: also find the text around this many nearest neighbors of each context. begun: a forward pass of these
        contexts that is under way, used when it is the one that the plan needs. Raises InvalidRequest for an empty
        context, TooLarge for one that the model does not take, and what the services raise.
        """
        self._check_contexts(contexts)
        wanted = Wanted(plan.needs_keys, plan.statistics)
        if begun is None or begun.wanted != wanted:
            begun = self._begin(contexts, wanted)
        try:
            forward = await begun.forward
        finally:
            await begun.stop()
        timings = dict(begun.timings)
        stretches = [Stretch(context, 0, np.array([len(context)])) for context in contexts]
        asked = Step(stretches, forward.keys, passages=passages, passage_tokens=passage_tokens)
        plan, answers = await self._answers(plan, asked, timings)
        log_probs = required(forward.log_probs)
        mixing = computed(log_probs.size, mix_evidence, log_probs, answers, statistics(forward))
        mixed = await timed(mixing, "mix", timings)
        found = [result for answer in answers for result in answer.evidence.found]
        return NextTokens(mixed, plan.domains, found, plan.degraded, timings)

    async def score(
        self, plan: Plan, tokens: Ids, *, context_length: int | None = None, min_context: int | None = None
    ) -> Score:
        """Log-probability of every token but the first of a text of any length, a (t,) int32 array with its BOS.

        context_length, min_context: see `choose_windows`. Model, sources and mixing work at the same time, on different
        batches of windows: `timings` say how long each was waited for, and add up to more than the call took. Raises
        InvalidRequest for a text without a token to predict, and what the services raise.
        """
        if len(tokens) < 2:
            raise InvalidRequest(f"nothing to score: expected at least 2 tokens, got {len(tokens)}", param="text")
        window = choose_windows(self._window_model, plan.infos, context_length, min_context)
        scoring = Scoring(tokens, plan, forward=self._forward, answers=self._answers)
        bos = plan.infos[0].window_bos_token_id if plan.infos else None  # as the keys were made
        mixed = await scoring.run(plan_fed_windows(len(tokens), *window, bos), self._batch_tokens)
        ended = scoring.plan
        return Score(tokens, mixed, *window, ended.domains, ended.degraded, scoring.timings)

    async def next_token(
        self, contexts: Sequence[Ids], options: Options = None, *, passages: int = 0, passage_tokens: int = 24
    ) -> NextTokens:
        """`plan` and `step`. When options like these made a plan before, the forward pass begins beside the plan."""
        self._check_contexts(contexts)
        likeness = _likeness(options)
        wanted = self._expected.pop(likeness, None)
        begun = None if wanted is None else self._begin(contexts, wanted)

        async def step(plan: Plan) -> NextTokens:
            if plan.sources and likeness is not None:
                self._expected[likeness] = Wanted(plan.needs_keys, plan.statistics)
                if len(self._expected) > MAX_EXPECTED:
                    del self._expected[next(iter(self._expected))]
            return await self.step(plan, contexts, passages=passages, passage_tokens=passage_tokens, begun=begun)

        try:
            return await self.planned(options, step)
        finally:
            if begun is not None:
                await begun.stop()

    async def score_text(
        self,
        tokens: Ids,
        options: Options = None,
        *,
        context_length: int | None = None,
        min_context: int | None = None,
    ) -> Score:
        """`plan` and `score`."""
        return await self.planned(
            options, lambda plan: self.score(plan, tokens, context_length=context_length, min_context=min_context)
        )

    async def planned(self, options: Options, work: Callable[[Plan], Awaitable[T]]) -> T:
        """work(plan) with a plan of these options; once more with a new one when a version was let go meanwhile that
        the caller did not choose."""
        plan = await self.plan(options)
        try:
            return await work(plan)
        except UnknownVersion:
            if plan.pinned:
                raise
        return await work(await self.plan(options))

    def _begin(self, contexts: Sequence[Ids], wanted: Wanted) -> Begun:
        request = ForwardRequest(
            tokens=contexts,
            positions=[np.array([len(c) - 1], np.int32) for c in contexts],
            full=True,
            keys=wanted.keys,
            statistics=wanted.statistics,
        )
        timings: dict[str, float] = {}
        return Begun(wanted, asyncio.ensure_future(self._forward(request, timings)), timings)

    async def _answers(self, plan: Plan, step: Step, timings: dict[str, float]) -> tuple[Plan, list[Answered]]:
        """What the sources say, and the plan that goes on: without sources once they failed and are optional."""
        if not plan.sources:
            return plan, []
        try:
            found = await timed(together([source.evidence(step) for source in plan.sources]), "search", timings)
        except (Unavailable, DeadlineExceeded) as err:
            if not plan.optional:
                raise
            return plan.without_sources(err.message), []
        return plan, [
            Answered(source.name, source.kind, source.weighing, evidence)
            for source, evidence in zip(plan.sources, found, strict=True)
        ]

    async def _forward(self, request: ForwardRequest, timings: dict[str, float]) -> ForwardResult:
        """Raises Unavailable when another model than `info` answers: its keys would find nonsense without a word."""
        result = await timed(self._lm.forward(request), "lm", timings)
        if result.fingerprint != self.info.fingerprint:
            raise Unavailable(
                f"the lm service answers with another model (fingerprint {result.fingerprint}) than "
                f"{self.info.model_id} ({self.info.fingerprint}), which it announced"
            )
        return result

    def _check_contexts(self, contexts: Sequence[Ids]) -> None:
        for context in contexts:
            if not len(context):
                raise InvalidRequest("the context is empty: expected at least one token", param="tokens")
            if len(context) > self.info.context_length:
                raise TooLarge(
                    f"the context has {len(context)} tokens, the model takes {self.info.context_length}", param="text"
                )


def _likeness(options: Options) -> tuple[object, ...] | None:
    """Equal for options whose plans need the same of the model, most likely; None where that is not known."""
    knn = options.get("knn") if isinstance(options, Mapping) and len(options) == 1 else options
    if not isinstance(knn, KnnOptions):
        return None
    return (knn.rule, *((d.domain, d.version, d.lmbda is None) for d in knn.domains))


def _check_weights(sources: Sequence[Source]) -> None:
    """Raises InvalidRequest for lambdas that the caller gave and that leave less than nothing; fitted ones share what
    there is (knnlm.rules.shared)."""
    asked = [s.weighing.parameters["lambda"] for s in sources if s.weighing.asked and s.weighing.rule == FIXED]
    total = sum(value for value in asked if isinstance(value, int | float))
    if total > 1 + TOLERANCE:
        raise InvalidRequest(f"the lambdas add up to {total:g}, at most 1 is left", param="lambda")
