"""The choices of one request while they are generated: each is a task that takes part in the rounds of all.

What they make goes through a bounded queue to the one who reads: a slow reader holds up its own choices and nobody
else's.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import numpy as np

from knnlm.clients.explained import ExplainedToken, explained_token
from knnlm.errors import UnknownVersion
from knnlm.generation import FINISHED_LENGTH, Generator, NewToken, version_gone
from knnlm.mixer import Mixer
from knnlm.prompts import PromptScore, score_prompt
from knnlm.sources import Plan
from knnlm.tokenizer import Tokenizer
from services.aggregator.completions.metrics import CompletionMetrics
from services.aggregator.completions.reading import CheckedRequest

WAITING_PIECES = 64  # unread pieces of one request, beyond which its choices wait for the reader


@dataclass(frozen=True)
class Listed:
    """One token as logprobs show it. log_prob: None where nothing precedes it. offset: in the choice's text."""

    token: int
    text: str
    offset: int
    log_prob: float | None
    top: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Piece:
    """What one choice has more of. index: of the choice among all that are generated. tokens: listed, the prompt's
    before the first one with `echo`. generated: how many of them are new. searches_skipped: for these. finish: None, or
    why this is the last."""

    index: int
    text: str
    tokens: Sequence[Listed] = ()
    generated: int = 0
    finish: str | None = None
    stopped_at: str | int | None = None
    degraded: str | None = None
    explained: ExplainedToken | None = None
    searches_skipped: int = 0


@dataclass
class Choices:
    """The choices of one request: `begin`, then `pieces`, and `close` in any case.

    started: when the request arrived, on the clock of time.perf_counter. timings: seconds per stage of the first one.
    """

    checked: CheckedRequest
    generator: Generator
    mixer: Mixer
    tokenizer: Tokenizer
    metrics: CompletionMetrics
    started: float
    timings: dict[str, float] = field(default_factory=dict)
    plan: Plan = field(default_factory=Plan)

    def __post_init__(self) -> None:
        self._queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(WAITING_PIECES)
        self._tasks: list[asyncio.Task[None]] = []
        self._first: list[Piece | None] = []
        self._scores: dict[int, PromptScore] = {}
        self._scoring = [asyncio.Lock() for _ in self.checked.prompts]

    async def begin(self, plan: Plan) -> None:
        """Begin, and wait for the first token of any choice. Raises what kept it from coming; then nothing is left."""
        self.plan, self._queue, self._scores = plan, asyncio.Queue(WAITING_PIECES), {}
        self._tasks = [asyncio.create_task(self._guarded(i)) for i in range(self.checked.choices)]
        try:
            self._first = [await self._next()]
        except BaseException:
            await self.close()
            raise

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all choices as they come. Raises what keeps one of them from going on."""
        left = len(self._tasks)
        while left:
            try:
                piece = self._first.pop() if self._first else await self._next()
            except UnknownVersion as err:
                raise version_gone(err) from err
            if piece is None:
                left -= 1
            else:
                yield piece

    async def close(self) -> None:
        """End what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _next(self) -> Piece | None:
        got = await self._queue.get()
        if isinstance(got, Exception):
            raise got
        return got

    async def _guarded(self, index: int) -> None:
        try:
            await self._choice(index)
        except Exception as err:  # noqa: BLE001  the edge of a task: it is raised again where the pieces are read
            await self._queue.put(err)
        else:
            await self._queue.put(None)

    async def _choice(self, index: int) -> None:
        checked = self.checked
        number, choice = divmod(index, checked.made)
        prompt = checked.prompts[number]
        before = await self._echoed(index, number) if checked.echo else Piece(index, "")
        shown, finished, last = len(before.text), False, None
        generated = self.generator.generate(prompt, checked.options, self.plan, seed=checked.seed, choice=choice)
        async with aclosing(generated) as tokens:
            async for new in tokens:
                now = time.perf_counter()
                self.metrics.generated(now - (self.started if last is None else last), first=last is None)
                last = now
                if index == 0:
                    for stage, seconds in new.row.timings.items():
                        self.timings[stage] = self.timings.get(stage, 0.0) + seconds
                await self._queue.put(_joined(before, await self._piece(index, shown, new)))
                before, finished = Piece(index, ""), new.finish is not None
        if not finished:
            await self._queue.put(replace(before, finish=FINISHED_LENGTH))

    async def _piece(self, index: int, shown: int, new: NewToken) -> Piece:
        listed = Listed(new.token, new.piece, shown + new.offset, new.log_prob, new.top)
        explained = None
        if self.checked.explain:  # on a thread: it may have many passages
            explained = await asyncio.to_thread(explained_token, new, self.tokenizer)
        ended = new.finish, new.stopped_at, new.degraded
        return Piece(index, new.text, [listed], 1, *ended, explained, new.row.searches_skipped)

    async def _echoed(self, index: int, number: int) -> Piece:
        """The prompt, and how likely its tokens are if that was asked for."""
        score = None if self.checked.logprobs is None else await self._score(number)
        return await asyncio.to_thread(self._prompt, index, number, score)

    def _prompt(self, index: int, number: int, score: PromptScore | None) -> Piece:
        checked = self.checked
        prompt, hidden_bos = checked.prompts[number], checked.hidden_bos[number]
        reader = self.tokenizer.reader(inside=False)
        texts = [reader.add(token) for token in prompt.tolist()]
        if not checked.options.max_tokens:
            texts[-1] += reader.end()
        if hidden_bos:
            texts[0] = ""
        offsets = np.cumsum([0, *(len(text) for text in texts)]).tolist()
        degraded = None
        listed = [Listed(int(prompt[0]), texts[0], 0, None)]
        if score is not None:
            degraded = score.plan.degraded
            listed += [
                Listed(one.token, text, offset, one.log_prob, one.top)
                for one, text, offset in zip(score.tokens, texts[1:], offsets[1:], strict=False)
            ]
        return Piece(index, "".join(texts), listed, degraded=degraded)

    async def _score(self, number: int) -> PromptScore:
        """The score of one prompt, made once for all of its choices."""
        async with self._scoring[number]:
            if number not in self._scores:
                prompt, top = self.checked.prompts[number], self.checked.options.top
                self._scores[number] = await score_prompt(self.mixer, self.plan, prompt, top, self.timings)
            return self._scores[number]


def _joined(before: Piece, piece: Piece) -> Piece:
    if not before.tokens:
        return piece
    return replace(
        piece,
        text=before.text + piece.text,
        tokens=[*before.tokens, *piece.tokens],
        degraded=piece.degraded or before.degraded,
    )
