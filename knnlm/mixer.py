"""The flow of a kNN-LM call: plan once, then step or score. Written once over protocols.py.

The aggregator runs it over gRPC clients, knnlm.pipeline over objects in the same process, so that server and library
cannot drift apart. A plan asks once which version of each domain answers, and every search with it pins that version:
one answer never mixes two. Replicas may let go of it meanwhile; then the call is made again with a new plan, once.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from knnlm.decoding import Mixed, choose_windows, mix_evidence, plan_fed_windows
from knnlm.domains import NoDatastore
from knnlm.errors import DeadlineExceeded, InvalidRequest, TooLarge, Unavailable, UnknownVersion
from knnlm.evidence import Evidence, Step, Stretch
from knnlm.memories import KeyMemory
from knnlm.messages import PASSAGE_TOKENS, ForwardRequest, ForwardResult, ModelInfo, SearchResult, required
from knnlm.mixture import TOLERANCE
from knnlm.options import KnnOptions
from knnlm.protocols import DatastoreClient, LanguageModelClient
from knnlm.rules import FIXED
from knnlm.scoring import NOTHING_ELSE, Score, Scoring
from knnlm.sources import (
    SOURCES,
    Plan,
    Services,
    Source,
    Timings,
    UsedDomain,
    UsedMemory,
    computed,
    source_kind,
    timed,
    together,
)

SEARCHED_BYTES = 16  # bytes of one neighbor with its entry number
PASSAGE_BYTES = 256  # bytes of the text around an entry, beside its tokens
EXPLAINED_BYTES = 1 << 25  # bytes of the answers of the datastore service about one batch of windows
T = TypeVar("T")
Ids = npt.NDArray[np.int32]
Keys = npt.NDArray[np.floating]
Options = KnnOptions | Mapping[str, Any] | None  # Any: a record of options for each row of knnlm.sources.SOURCES


@dataclass(frozen=True)
class NextTokens:
    """mixed: (n, V) distributions of the next token of n contexts. found: one SearchResult per used domain.

    degraded: why the answer comes from the LM alone, None when it is as asked. timings: seconds per stage.
    """

    mixed: Mixed
    domains: Sequence[UsedDomain] = ()
    memories: Sequence[UsedMemory] = ()
    found: Sequence[SearchResult] = ()
    degraded: str | None = None
    timings: Mapping[str, float] = field(default_factory=dict)


class Early:
    """Sources that need nothing of the LM, asked about a step while it works; they are let go when that fails.

    begun: what they will say, by their places in the plan.
    """

    def __init__(self, plan: Plan, step: Step) -> None:
        self.begun: dict[int, asyncio.Future[Evidence]] = {}
        for i, source in enumerate(plan.sources):
            if not source.needs_keys:
                self.begun[i] = asyncio.ensure_future(source.evidence(step))
                self.begun[i].add_done_callback(_heard)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.drop()

    def drop(self) -> None:
        for answer in self.begun.values():
            answer.cancel()


def _heard(answer: asyncio.Future[Evidence]) -> None:
    """Whoever waits for the answer is told of its error; nobody waits for one that was let go."""
    if not answer.cancelled():
        answer.exception()


class Mixer:
    """`info` is the model behind `lm`: domains made by another model, tokenizer or key function are refused.

    batch_tokens: of windows that are sent to the model at once. max_window: tokens of the longest window; None: what
    the model takes. memories: models that can be mixed, by name. down: why what is behind a kind of source with these
    options is known not to answer now, None when it may. Callers that can do without then do so at once. skipped: told
    of predictions for which a source was not searched (knnlm.evidence.Evidence).
    """

    def __init__(
        self,
        lm: LanguageModelClient,
        datastore: DatastoreClient | None,
        info: ModelInfo,
        *,
        batch_tokens: int = 4096,
        max_window: int | None = None,
        memories: Mapping[str, LanguageModelClient | KeyMemory] | None = None,
        down: Callable[[str, Any], str | None] = lambda _kind, _options: None,  # Any: a record of options
        skipped: Callable[[int], None] = lambda _searches: None,
    ) -> None:
        self.info = info
        self._lm = lm
        self._services = Services(info, datastore or NoDatastore(), memories=memories or {})
        self._batch_tokens = batch_tokens
        self._window_model = replace(info, context_length=min(info.context_length, max_window or info.context_length))
        self._down = down
        self._skipped = skipped

    async def plan(self, options: Options = None) -> Plan:
        """The sources that the options mean, resolved, pinned and checked; none for the LM alone.

        options: of one kind, or by kind. Nothing is asked of the model. Raises InvalidRequest for an unknown source or
        rule and for weights above one, what the kinds of sources raise, and Unavailable or DeadlineExceeded unless the
        LM alone may answer.
        """
        asked = {"knn": options} if isinstance(options, KnnOptions) else dict(options or {})
        kinds = {name: source_kind(name) for name in asked}
        optional = all(kind.optional(asked[name]) for name, kind in kinds.items())
        problems = (self._down(name, given) for name, given in asked.items()) if optional else ()
        down = next((problem for problem in problems if problem is not None), None)
        if down is not None:
            return Plan(degraded=down)
        plan = Plan()
        try:
            for name in (n for n in SOURCES if n in kinds):
                services = replace(self._services, asked=frozenset(asked), infos=plan.infos, used=plan.domains)
                plan += await kinds[name].resolve(asked[name], services)
        except (Unavailable, DeadlineExceeded) as err:
            if not optional:
                raise
            return Plan(degraded=err.message)
        _check_weights(plan.sources)
        return replace(plan, ahead=0) if plan.in_order else plan  # such a source must see certain tokens alone

    async def step(
        self,
        plan: Plan,
        contexts: Sequence[Ids],
        *,
        passages: int = 0,
        passage_tokens: int = PASSAGE_TOKENS,
    ) -> NextTokens:
        """The distribution of the token after each context, a (t_i,) int32 array with its BOS.

        passages: also find the text around this many nearest neighbors of each context. Raises InvalidRequest for an
        empty context, TooLarge for one that the model does not take, and what the services raise.
        """
        self.check_contexts(contexts, plan)
        request = ForwardRequest(
            tokens=contexts,
            positions=[np.array([len(c) - 1], np.int32) for c in contexts],
            full=True,
            keys=plan.needs_keys,
            statistics=plan.statistics,
        )
        timings: Timings = {}
        with Early(plan, Step([Stretch(context, 0, np.array([len(context)])) for context in contexts])) as early:
            forward = await self.forward(request, timings)
        before = await self.before(contexts, [plan.earlier({})] * len(contexts), timings)
        stretches = [
            Stretch(context, 0, np.array([len(context)]), before=keys)
            for context, keys in zip(contexts, before, strict=True)
        ]
        asked = Step(
            stretches,
            forward.keys,
            passages=passages,
            passage_tokens=passage_tokens,
            statistics=forward.statistics,
        )
        plan, answers = await self.answers(plan, asked, timings, early)
        log_probs = required(forward.log_probs)
        mixing = computed(log_probs.size, mix_evidence, log_probs, plan.sources, answers, forward.statistics)
        mixed = await timed(mixing, "mix", timings)
        found = [result for answer in answers for result in answer.found]
        return NextTokens(mixed, plan.domains, plan.memories, found, plan.degraded, timings)

    async def score(
        self, plan: Plan, tokens: Ids, *, context_length: int | None = None, min_context: int | None = None
    ) -> Score:
        """Log-probability of every token but the first of a text of any length, a (t,) int32 array with its BOS.

        context_length, min_context: see `choose_windows`. Model, sources and mixing work at the same time, on different
        batches of windows: `timings` say how long each was waited for, and add up to more than the call took. Raises
        InvalidRequest for a text without a token to predict, and what the services raise.
        """
        return await self._scored(plan, tokens, 1, NOTHING_ELSE, self._batch_tokens, context_length, min_context)

    async def explain(
        self,
        plan: Plan,
        tokens: Ids,
        *,
        first: int = 1,
        passages: int = 3,
        passage_tokens: int = PASSAGE_TOKENS,
        context_length: int | None = None,
        min_context: int | None = None,
    ) -> Score:
        """`score` of tokens[first:], and the entries that gave each of them most of what it has by retrieval.

        They are in `mixed.components[...].evidence.carried`, at most `passages` of each token with `passage_tokens`
        tokens of text on each side, and in `documents`. Each batch of windows is searched once, and the text around all
        its entries is looked up at once. Log-probabilities are those of `score`. Raises as it does.
        """
        bytes_each = sum(SEARCHED_BYTES * used.k for used in plan.domains)
        bytes_each += passages * (PASSAGE_BYTES + 8 * passage_tokens)
        batch_tokens = min(self._batch_tokens, EXPLAINED_BYTES // max(1, bytes_each))
        asked = Step((), carriers=passages, passage_tokens=passage_tokens)
        return await self._scored(plan, tokens, first, asked, batch_tokens, context_length, min_context)

    async def _scored(
        self,
        plan: Plan,
        tokens: Ids,
        first: int,
        asked: Step,
        batch_tokens: int,
        context_length: int | None,
        min_context: int | None,
    ) -> Score:
        if not 1 <= first < len(tokens):
            raise InvalidRequest(
                f"nothing to score: expected at least {first + 1} tokens, got {len(tokens)}", param="text"
            )
        model = self._window_model
        if plan.context_length is not None:
            model = replace(model, context_length=min(model.context_length, plan.context_length))
        window = choose_windows(model, plan.infos, context_length, min_context)
        bos = plan.infos[0].window_bos_token_id if plan.infos else None  # as the keys were made
        windows = plan_fed_windows(len(tokens), *window, bos)
        if not plan.in_order:  # such a source needs all that stands before
            windows = [replace(w, first=max(w.first, first)) for w in windows if w.end > first]
        scoring = Scoring(tokens, plan, forward=self.forward, answers=self.answers, asked=asked)
        mixed = (await scoring.run(windows, batch_tokens)).last(len(tokens) - first)
        ended = scoring.plan
        return Score(tokens, mixed, *window, first, ended.domains, ended.memories, ended.degraded, scoring.timings)

    async def next_token(
        self,
        contexts: Sequence[Ids],
        options: Options = None,
        *,
        passages: int = 0,
        passage_tokens: int = PASSAGE_TOKENS,
    ) -> NextTokens:
        """`plan` and `step`. A context that cannot be taken is refused before anything is asked."""
        self.check_contexts(contexts)
        return await self.planned(
            options, lambda plan: self.step(plan, contexts, passages=passages, passage_tokens=passage_tokens)
        )

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

    async def explain_text(
        self,
        tokens: Ids,
        options: Options = None,
        **asked: Any,  # Any: the keywords of `explain`
    ) -> Score:
        """`plan` and `explain`, with its keywords."""
        return await self.planned(options, lambda plan: self.explain(plan, tokens, **asked))

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

    async def answers(
        self, plan: Plan, step: Step, timings: Timings, early: Early | None = None
    ) -> tuple[Plan, list[Evidence]]:
        """What each source says, and the plan that goes on: without sources once they failed and are optional. early:
        what some of them were asked before."""
        if not plan.sources:
            return plan, []
        begun = {} if early is None else early.begun
        calls = [begun[i] if i in begun else source.evidence(step) for i, source in enumerate(plan.sources)]
        try:
            found = await timed(together(calls), "search", timings)
        except (Unavailable, DeadlineExceeded) as err:
            if not plan.optional:
                raise
            return Plan(degraded=err.message), []
        skipped = sum(int(evidence.skipped.sum()) for evidence in found)
        if skipped:
            self._skipped(skipped)
        return plan, found

    async def forward(self, request: ForwardRequest, timings: Timings) -> ForwardResult:
        """Raises Unavailable when another model than `info` answers: neighbors of its keys would mean nothing."""
        result = await timed(self._lm.forward(request), "lm", timings)
        if result.fingerprint != self.info.fingerprint:
            raise Unavailable(
                f"the lm service answers with another model (fingerprint {result.fingerprint}) than "
                f"{self.info.model_id} ({self.info.fingerprint}), which it announced"
            )
        return result

    async def before(
        self, contexts: Sequence[Ids], wanted: Sequence[int], timings: Timings, *, cache: bool = False
    ) -> list[Keys | None]:
        """The keys (b, d) of the places before each context's next token, of at most as many as are wanted; None
        where none are. Equal contexts are asked about once. cache: as in ForwardRequest. Raises as `forward`."""
        found: list[Keys | None] = [None] * len(contexts)
        distinct: dict[tuple[bytes, int], list[int]] = {}
        for i, (context, places) in enumerate(zip(contexts, wanted, strict=True)):
            if places and len(context) > 1:
                distinct.setdefault((context.tobytes(), places), []).append(i)

        async def ask(places: int, rows: Sequence[int]) -> None:
            context = contexts[rows[0]]
            positions = np.arange(max(0, len(context) - 1 - places), len(context) - 1, dtype=np.int32)
            request = ForwardRequest([context], [positions], keys=True, cache=cache)
            keys = required((await self.forward(request, timings)).keys)
            for row in rows:
                found[row] = keys

        if distinct:
            await together([ask(places, rows) for (_, places), rows in distinct.items()])
        return found

    def context_length(self, plan: Plan | None = None) -> int:
        """Tokens that the model takes, and with it the sources of a plan."""
        most = self.info.context_length
        return most if plan is None or plan.context_length is None else min(most, plan.context_length)

    def check_contexts(self, contexts: Sequence[Ids], plan: Plan | None = None) -> None:
        """Raises InvalidRequest for an empty one, TooLarge for one that the model or the plan's sources do not take."""
        most = self.context_length(plan)
        for context in contexts:
            if not len(context):
                raise InvalidRequest("the context is empty: expected at least one token", param="tokens")
            if len(context) > most:
                who = "the model takes" if most == self.info.context_length else "the memory that is mixed takes"
                raise TooLarge(f"the context has {len(context)} tokens, {who} {most}", param="text")


def _check_weights(sources: Sequence[Source]) -> None:
    """Raises InvalidRequest for lambdas that the caller gave and that leave less than nothing; fitted ones share what
    there is (knnlm.rules.shared)."""
    asked = [s.weighing.parameters["lambda"] for s in sources if s.weighing.asked and s.weighing.rule == FIXED]
    total = sum(value for value in asked if isinstance(value, int | float))
    if total > 1 + TOLERANCE:
        raise InvalidRequest(f"the lambdas add up to {total:g}, at most 1 is left", param="lambda")
