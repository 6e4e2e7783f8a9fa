"""The next tokens of many sequences, made together in rounds.

A round is one forward pass for the newest token of every sequence and one search for each distinct way to search.
Whoever asks while a round is under way is in the next one; nothing waits for a timer, and a sequence that asks for
nothing, because its reader is slow or has left, holds up nobody.

With a large vocabulary whole rows of probabilities stay with the language model: it answers the likeliest tokens, and
after the search those that neighbors store. What such a part leaves open is said (knnlm.sampling.Known), and the whole
row is asked for only then.
"""

import asyncio
import contextvars
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from knnlm.decoding import mix_evidence, weighed
from knnlm.errors import DeadlineExceeded, InvalidRequest
from knnlm.evidence import Evidence, Step, Stretch
from knnlm.messages import PASSAGE_TOKENS, ForwardRequest, ForwardResult, required
from knnlm.mixer import Early, Mixer, NextTokens, Options
from knnlm.rows import Ids, Row, StepRequest, mixed_at, partial, stored_tokens
from knnlm.sampling import Known
from knnlm.sources import Plan, Timings, computed
from knnlm.transport.context import outgoing, outgoing_deadline, outgoing_id, outgoing_metadata

WHOLE_ROW_TOKENS = 16_384  # with a larger vocabulary only parts of a row are asked for
LIKELIEST_TOKENS = 512  # tokens asked for first of a row of which only a part is
FORWARD_TOKENS = 32_768  # tokens of one forward request, unless one sequence has more
FORWARD_NUMBERS = 1 << 23  # probabilities in its answer
NUMBERS_AT_A_TIME = 8  # numbers mixed in the time that `computed` counts for one: most are only copied
TICKS = 3  # turns of the event loop, after which all whom a round answered have asked for their next step


@dataclass(eq=False)
class _WaitingStep:
    request: StepRequest
    answer: "asyncio.Future[Row]"
    deadline: float | None
    sent: tuple[str | None, Sequence[tuple[str, str]]]  # the id and the metadata of the caller's request
    early: "asyncio.Future[Known] | None" = None  # told what the LM says, before the sources have answered


@dataclass(frozen=True, eq=False)
class Begun:
    """A step under way. early: what the LM alone says, as soon as it is known. answer: the row."""

    request: StepRequest
    early: "asyncio.Future[Known]"
    answer: "asyncio.Future[Row]"
    task: "asyncio.Task[None]"
    deadline: float | None

    def cancel(self) -> None:
        """Nobody wants it any more."""
        self.early.cancel()
        self.answer.cancel()
        self.task.cancel()


class Rounds:
    """Belongs to the event loop in which `step` is first called.

    whole_row_tokens, likeliest: with a vocabulary of more tokens than the first, only the likeliest of a row are asked
    for at first. observe: told of every round how many contexts it had and how many seconds it took.
    """

    def __init__(
        self,
        mixer: Mixer,
        *,
        whole_row_tokens: int = WHOLE_ROW_TOKENS,
        likeliest: int = LIKELIEST_TOKENS,
        observe: Callable[[int, float], None] = lambda _contexts, _seconds: None,
    ) -> None:
        self._mixer = mixer
        self._partly = mixer.info.vocab_size > whole_row_tokens
        self._likeliest = min(likeliest, mixer.info.vocab_size)
        self._observe = observe
        self._waiting: list[_WaitingStep] = []
        self._running: asyncio.Task[None] | None = None

    async def step(self, request: StepRequest) -> Row:
        """The row after the context, from the next round.

        Raises InvalidRequest and TooLarge for a context that the model does not take, DeadlineExceeded when the time of
        the caller's request is over (knnlm.transport.context), and what the services raise.
        """
        asked = self._asked(request)
        self._waiting.append(asked)
        if self._running is None:
            # has a context of its own: it serves requests that come later, too
            self._running = asyncio.get_running_loop().create_task(self._run(), context=contextvars.Context())
        return await _in_time(asked.answer, asked.deadline)

    def begin(self, request: StepRequest) -> Begun:
        """A step that begins now, in a round of its own, whatever else is under way. Await its row with `settled`.
        Raises InvalidRequest and TooLarge as `step`."""
        asked = self._asked(request)
        asked.early = early = asyncio.get_running_loop().create_future()
        task = asyncio.get_running_loop().create_task(self._batch([asked]), context=contextvars.Context())
        return Begun(request, early, asked.answer, task, asked.deadline)

    async def settled(self, begun: Begun) -> Row:
        """The row of a step. Raises as `step`."""
        return await _in_time(begun.answer, begun.deadline)

    def _asked(self, request: StepRequest) -> _WaitingStep:
        self._mixer.check_contexts([request.context], request.plan)
        answer: asyncio.Future[Row] = asyncio.get_running_loop().create_future()
        return _WaitingStep(request, answer, outgoing_deadline(), (outgoing_id(), outgoing_metadata()))

    async def next_token(
        self, context: Ids, options: Options = None, *, passages: int = 0, passage_tokens: int = PASSAGE_TOKENS
    ) -> NextTokens:
        """The mixture after one context, as Mixer.next_token answers it, from the next round. context: (t,) int32.
        Raises as `step` and `Mixer.plan`."""
        self._mixer.check_contexts([context])

        async def step(plan: Plan) -> Row:
            return await self.step(
                StepRequest(plan, context, whole=True, passages=passages, passage_tokens=passage_tokens)
            )

        row = await self._mixer.planned(options, step)
        mixed, found = row.alone()
        return NextTokens(mixed, row.plan.domains, row.plan.memories, found, row.plan.degraded, row.timings)

    async def completed(self, row: Row, request: StepRequest) -> Row:
        """The row of a request, complete. Raises what the lm service raises."""
        if row.complete:
            return row
        timings = dict(row.timings)  # the other rows of the round share theirs
        forward = await self._mixer.forward(_forward_request([request], full=True, keys=False), timings)
        lm = required(forward.log_probs)
        tokens = np.arange(lm.shape[1])
        return replace(
            row,
            known=Known(tokens, mixed_at(lm[0], row.shares, row.at, tokens)),
            lm_log_probs=lm[0].astype(np.float64),
            timings=timings,
        )

    async def _run(self) -> None:
        try:
            while self._waiting:
                for _ in range(TICKS):
                    await asyncio.sleep(0)
                asked = [a for a in self._waiting if not a.answer.done()]  # the others' callers left
                self._waiting = []
                if not asked:
                    continue
                started = time.perf_counter()
                await asyncio.gather(*(self._batch(batch) for batch in self._batches(asked)))
                self._observe(len(asked), time.perf_counter() - started)
        finally:
            self._running = None

    def _batches(self, asked: Sequence[_WaitingStep]) -> list[list[_WaitingStep]]:
        """The steps in batches, each of one forward request: cached or not, whole rows or parts, of bounded size."""
        numbers = self._mixer.info.vocab_size
        batches: list[list[_WaitingStep]] = []
        for kind in {(a.request.cache, self._whole(a.request)) for a in asked}:
            same = [a for a in asked if (a.request.cache, self._whole(a.request)) == kind]
            batch: list[_WaitingStep] = []
            tokens = 0
            for one in same:
                tokens += len(one.request.context)
                if batch and (tokens > FORWARD_TOKENS or (kind[1] and (len(batch) + 1) * numbers > FORWARD_NUMBERS)):
                    batches.append(batch)
                    batch, tokens = [], len(one.request.context)
                batch.append(one)
            batches.append(batch)
        return batches

    def _whole(self, request: StepRequest) -> bool:
        # of a source that gives all tokens a probability no part is enough
        return request.whole or request.plan.whole or not self._partly

    async def _batch(self, asked: Sequence[_WaitingStep]) -> None:
        """One forward pass, then the sources of each way at the same time. Every answer is settled."""
        requests = [a.request for a in asked]
        whole = self._whole(requests[0])
        deadlines = [a.deadline for a in asked]
        timings: Timings = {}
        latest = None if None in deadlines else max(d for d in deadlines if d is not None)
        request_id, metadata = asked[0].sent  # one of them must do: calls to the services have one id and one trace
        ways = _ways(requests)
        with outgoing(request_id=request_id, deadline=latest, metadata=metadata), ExitStack() as letting_go:
            steps = [(requests[places[0]].plan, _early_step([requests[i] for i in places])) for places in ways]
            early = [letting_go.enter_context(Early(*each)) for each in steps]
            try:
                forward = await self._mixer.forward(
                    _forward_request(
                        requests, full=whole, keys=any(r.plan.needs_keys for r in requests),
                        statistics=any(r.plan.statistics for r in requests),
                        top_n=0 if whole else self._likeliest,
                    ),
                    timings,
                )  # fmt: skip
            except InvalidRequest as err:
                _drop(early)
                if len(asked) == 1:
                    _fail(asked, err)
                else:  # nobody fails by what a stranger asked
                    await asyncio.gather(*(self._batch([one]) for one in asked))
                return
            except Exception as err:  # noqa: BLE001  the edge of a task: it is raised again where the caller waits
                _drop(early)
                _fail(asked, err)
                return
            _tell(asked, forward)
            told = zip(ways, early, strict=True)
            await asyncio.gather(*(self._way([asked[i] for i in p], _rows(forward, p), timings, e) for p, e in told))

    async def _way(
        self, asked: Sequence[_WaitingStep], forward: ForwardResult, before: Mapping[str, float], early: Early
    ) -> None:
        """The rows of requests that are asked of the same sources."""
        requests, timings = [a.request for a in asked], dict(before)
        first = requests[0]
        try:
            earlier = [r.plan.earlier(r.state) for r in requests]
            keys_before = await self._mixer.before([r.context for r in requests], earlier, timings, cache=first.cache)
            stretches = [
                Stretch(r.context, 0, np.array([len(r.context)]), r.state, earlier_keys)
                for r, earlier_keys in zip(requests, keys_before, strict=True)
            ]
            keys = forward.keys if first.plan.needs_keys else None
            step = Step(
                stretches,
                keys,
                passages=first.passages,
                passage_tokens=first.passage_tokens,
                carriers=int(first.carriers),
                cache=first.cache,
                statistics=forward.statistics,
            )
            plan, answers = await self._mixer.answers(first.plan, step, timings, early)
            if self._whole(first):
                rows = await self._whole_rows(plan, forward, answers, timings)
            else:
                rows = await self._partial_rows(requests, plan, forward, answers, timings)
        except Exception as err:  # noqa: BLE001  the edge of a task: it is raised again where the caller waits
            _fail(asked, err)
            return
        for one, row in zip(asked, rows, strict=True):
            if not one.answer.done():
                one.answer.set_result(row)

    async def _whole_rows(
        self, plan: Plan, forward: ForwardResult, answers: Sequence[Evidence], timings: Timings
    ) -> list[Row]:
        lm = required(forward.log_probs)
        started = time.perf_counter()
        mixed = await computed(
            lm.size // NUMBERS_AT_A_TIME, mix_evidence, lm, plan.sources, answers, forward.statistics
        )
        timings["mix"] = time.perf_counter() - started
        tokens = np.arange(lm.shape[1])
        found = [result for evidence in answers for result in evidence.found]
        return [
            Row(plan, Known(tokens, mixed.log_probs[i]), mixed.lm_log_probs[i], mixed.components, i, found, timings)
            for i in range(len(lm))
        ]

    async def _partial_rows(
        self,
        requests: Sequence[StepRequest],
        plan: Plan,
        forward: ForwardResult,
        answers: Sequence[Evidence],
        timings: Timings,
    ) -> list[Row]:
        shares = weighed(plan.sources, answers, forward.statistics)
        top, top_log_probs = required(forward.top_tokens), required(forward.top_log_probs)
        candidates = [
            np.setdiff1d(np.concatenate([stored_tokens(shares, i), np.array(r.known, np.int64)]), top[i]).astype(
                np.int32
            )
            for i, r in enumerate(requests)
        ]
        others, sums = await self._asked_about(requests, candidates, timings)
        found = [result for evidence in answers for result in evidence.found]
        return [
            Row(plan, *partial(
                np.concatenate([top[i], candidates[i]]), np.concatenate([top_log_probs[i], others[i]]),
                float(top_log_probs[i, -1]), float(sums[i]), request.temperature, shares, i,
            ), shares, i, found, timings)
            for i, request in enumerate(requests)
        ]  # fmt: skip

    async def _asked_about(
        self, requests: Sequence[StepRequest], candidates: Sequence[npt.NDArray[np.int32]], timings: Timings
    ) -> tuple[Sequence[npt.NDArray[np.float32]], npt.NDArray[np.floating]]:
        """The LM's log-probabilities of each row's candidates, and each row's log power sum at its temperature."""
        temperatures = np.array([r.temperature or 1.0 for r in requests], np.float32)
        tempered = bool(np.any(temperatures != 1.0))
        if not tempered and not any(len(c) for c in candidates):
            return [np.empty(0, np.float32) for _ in requests], np.zeros(len(requests))
        asked = _forward_request(requests, full=False, keys=False)
        asked = replace(asked, candidates=candidates, temperatures=temperatures if tempered else None)
        answer = await self._mixer.forward(asked, timings)
        ends = np.cumsum([len(c) for c in candidates])[:-1]
        sums = np.zeros(len(requests)) if answer.log_power_sums is None else answer.log_power_sums
        return np.split(required(answer.candidate_log_probs), ends), sums


def _forward_request(
    requests: Sequence[StepRequest], *, full: bool, keys: bool, statistics: bool = False, top_n: int = 0
) -> ForwardRequest:
    return ForwardRequest(
        tokens=[r.context for r in requests],
        positions=[np.array([len(r.context) - 1], np.int32) for r in requests],
        full=full,
        keys=keys,
        statistics=statistics,
        top_n=top_n,
        cache=requests[0].cache,
    )


def _ways(requests: Sequence[StepRequest]) -> list[list[int]]:
    """The places of requests that are asked of the same sources, together."""
    ways: list[tuple[tuple[object, ...], list[int]]] = []
    for i, request in enumerate(requests):
        places = next((places for way, places in ways if way == request.way), None)
        if places is None:
            ways.append((request.way, places := []))
        places.append(i)
    return [places for _, places in ways]


def _early_step(requests: Sequence[StepRequest]) -> Step:
    stretches = [Stretch(r.context, 0, np.array([len(r.context)]), r.state) for r in requests]
    return Step(stretches, cache=requests[0].cache)


def _drop(early: Sequence[Early]) -> None:
    for one in early:
        one.drop()


def _rows(forward: ForwardResult, places: Sequence[int]) -> ForwardResult:
    """The answer at some of its rows; it holds no candidates."""
    arrays: dict[str, Any] = {
        f.name: value for f in fields(forward) if isinstance(value := getattr(forward, f.name), np.ndarray)
    }
    return replace(forward, **{name: array[list(places)] for name, array in arrays.items()})


def _tell(asked: Sequence[_WaitingStep], forward: ForwardResult) -> None:
    """Tells what the LM says to those that wait for it."""
    for i, one in enumerate(asked):
        if one.early is None or one.early.done():
            continue
        if forward.log_probs is not None:
            row = forward.log_probs[i]
            one.early.set_result(Known(np.arange(len(row)), row.astype(np.float64)))
        else:
            tokens, likeliest = required(forward.top_tokens)[i], required(forward.top_log_probs)[i]
            one.early.set_result(Known(tokens, likeliest.astype(np.float64), float(likeliest[-1])))


def _fail(asked: Sequence[_WaitingStep], err: Exception) -> None:
    for one in asked:
        if not one.answer.done():
            one.answer.set_exception(copy.copy(err))  # each caller names the field in its own words
        if one.early is not None:
            one.early.cancel()


async def _in_time(answer: "asyncio.Future[Row]", deadline: float | None) -> Row:
    """Raises DeadlineExceeded when the time of the caller's request is over before."""
    try:
        async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
            return await answer
    except TimeoutError as err:
        raise DeadlineExceeded("the request's time was over before its next token was there") from err
