"""Steps of one completion that are begun before it is certain which token they follow.

A search takes about as long as the forward pass of a single sequence. So while the neighbors of one place are searched,
the token that the language model alone would choose is drafted, and the pass after it begins. Each draft is compared
with what is chosen once the neighbors are known: where they differ, the steps behind it are dropped. What is chosen is
the same as without drafts (speculative retrieval, Zhang et al. 2024, arXiv 2401.14021).
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from knnlm.rounds import Begun, Rounds
from knnlm.rows import Row, StepRequest
from knnlm.sampling import Known

MIN_RIGHT_SHARE = 0.5  # share of right drafts from which on drafting gains time
AVERAGED_DRAFTS = 6  # drafts, about, that the share is of
RECOVERED_SHARE = 0.02  # what a step without drafts adds to the share: after some of them another draft is made

Draft = Callable[[Sequence[int], Known], StepRequest | None]


class StepsAhead:
    """The rows of one sequence, of which at most `most` steps are begun ahead. Close it.

    draft(drafted, known): the request of the step after the tokens that were drafted behind the certain ones and the
    one that is chosen by `known`; None where nothing is drafted. begun, kept: steps that were begun by a draft so far,
    and those whose draft was right. Where drafts are wrong more often than right, few are made.
    """

    def __init__(self, rounds: Rounds, draft: Draft, most: int) -> None:
        self.begun = self.kept = 0
        self._rounds = rounds
        self._draft = draft
        self._most = most
        self._waiting: deque[Begun] = deque()
        self._certain = 0  # tokens of the context that is not drafted
        self._right = 1.0  # share of the last drafts that were right, which rises while none are made

    async def row(self, request: StepRequest) -> Row:
        """The row after the context, as Rounds.step answers it; the drafts behind it are on their way meanwhile."""
        step = self._taken(request)
        self._certain = len(request.context)
        if self._right < MIN_RIGHT_SHARE:
            self._right += RECOVERED_SHARE
        while not step.answer.done() and len(self._waiting) < self._most and self._right >= MIN_RIGHT_SHARE:
            last = self._waiting[-1] if self._waiting else step
            waited: list[asyncio.Future[Any]] = [step.answer, last.early]  # Any: of two kinds
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if step.answer.done() or not self._go_on(last):
                break
        return await self._rounds.settled(step)

    async def close(self) -> None:
        """End what is under way."""
        dropped = list(self._waiting)
        self._waiting.clear()
        for step in dropped:
            step.cancel()
        await asyncio.gather(*(step.task for step in dropped), return_exceptions=True)

    def _taken(self, request: StepRequest) -> Begun:
        """The step that was begun for this context; else a new one, and what was begun on other tokens is dropped."""
        if self._waiting:
            right = np.array_equal(self._waiting[0].request.context, request.context)
            self._right += (right - self._right) / AVERAGED_DRAFTS
            if right:
                self.kept += 1
                return self._waiting.popleft()
        for step in self._waiting:
            step.cancel()
        self._waiting.clear()
        return self._rounds.begin(request)

    def _go_on(self, last: Begun) -> bool:
        """Begin the step after the one that `last` probably ends with. Whether there was one."""
        if last.early.cancelled() or last.early.exception() is not None:
            return False
        drafted = last.request.context[self._certain :].tolist()
        request = self._draft(drafted, last.early.result())
        if request is None:
            return False
        self.begun += 1
        self._waiting.append(self._rounds.begin(request))
        return True
