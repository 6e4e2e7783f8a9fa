"""How likely the tokens of a prompt are, and what would have been likelier: exact, without whole rows of a large
vocabulary.

A token that is among the n likeliest of the mixture is among the n likeliest of the language model, or some other
component gives it a probability: outside of these the mixture is the model's share alone. So the model is asked for its
likeliest tokens and then, once the sources have answered, for what they named.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from knnlm.decoding import Share, mix_evidence, weighed
from knnlm.evidence import Evidence, Step, Stretch
from knnlm.messages import ForwardRequest, ForwardResult, required
from knnlm.mixer import Mixer
from knnlm.rows import mixed_at, stored_tokens
from knnlm.sources import Plan, Timings

SOURCE_ROWS = 1024  # predictions that sources are asked about at once
WHOLE_NUMBERS = 1 << 23  # probabilities of whole rows that are made at once

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PromptToken:
    """A token of a prompt, natural logarithms. top: the likeliest tokens in its place; the same float stands there and
    in log_prob where it is one of them."""

    token: int
    log_prob: float
    lm_log_prob: float
    top: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class PromptScore:
    """tokens: all but the first, which nothing precedes. plan: the one that answered, without sources once they failed
    and the LM alone may answer."""

    tokens: Sequence[PromptToken]
    plan: Plan


async def score_prompt(mixer: Mixer, plan: Plan, tokens: Ids, top: int, timings: Timings) -> PromptScore:
    """The tokens of a prompt, a (t,) int32 array in one window of the model, with the `top` likeliest beside each.

    timings: seconds per stage are added to it. Raises what the services raise.
    """
    if len(tokens) < 2:
        return PromptScore([], plan)
    top = min(top, mixer.info.vocab_size)
    if plan.whole:
        return await _from_whole_rows(mixer, plan, tokens, top, timings)
    positions = [np.arange(len(tokens) - 1, dtype=np.int32)]
    request = ForwardRequest(
        [tokens], positions, targets=tokens[1:], top_n=top, keys=plan.needs_keys, statistics=plan.statistics
    )
    forward = await mixer.forward(request, timings)
    shares: list[Sequence[Share]] = []  # one for each row
    state: dict[str, Any] = {}  # Any: as in knnlm.evidence.Stretch
    for start in range(0, len(tokens) - 1, SOURCE_ROWS):
        end = min(start + SOURCE_ROWS, len(tokens) - 1)
        plan, answers = await _answers(mixer, plan, tokens, (start, end), forward, state, timings)
        if plan.degraded is not None:  # one answer never mixes two ways of making it
            shares = [()] * (len(tokens) - 1)
            break
        statistics = None if forward.statistics is None else forward.statistics.at(slice(start, end))
        shares += [weighed(plan.sources, answers, statistics)] * (end - start)
    return PromptScore(await _from_parts(mixer, tokens, top, forward, shares, timings), plan)


async def _from_parts(
    mixer: Mixer, tokens: Ids, top: int, forward: ForwardResult, shares: Sequence[Sequence[Share]], timings: Timings
) -> list[PromptToken]:
    """The tokens, from the LM's likeliest and those that sources name, about which the LM is asked in a second pass."""
    n, targets = len(shares), tokens[1:].astype(np.int64)
    seen = required(forward.top_tokens) if top else np.empty((n, 0), np.int32)
    seen_log_probs = required(forward.top_log_probs) if top else np.empty((n, 0), np.float32)
    rows = np.arange(n) % SOURCE_ROWS

    def named_tokens() -> list[Ids]:
        return [
            np.setdiff1d(np.append(stored_tokens(shares[j], rows[j]), targets[j]), seen[j]).astype(np.int32)
            for j in range(n)
        ]

    named = await asyncio.to_thread(named_tokens)
    answer = required(forward.target_log_probs)  # does where nothing is named but the target itself
    if any(shares):
        request = ForwardRequest([tokens], [np.arange(n, dtype=np.int32)], candidates=named)
        answer = required((await mixer.forward(request, timings)).candidate_log_probs)

    def listed() -> list[PromptToken]:
        if any(shares):
            others = np.split(answer, np.cumsum([len(tokens) for tokens in named])[:-1])
        else:
            others = [value[: len(named[j])] for j, value in enumerate(answer[:, None])]
        made = []
        for j in range(n):
            known = np.concatenate([seen[j], named[j]]).astype(np.int64)
            lm = np.concatenate([seen_log_probs[j], others[j]]).astype(np.float64)
            made.append(_token(int(targets[j]), known, mixed_at(lm, shares[j], int(rows[j]), known), lm, top))
        return made

    return await asyncio.to_thread(listed)


async def _from_whole_rows(mixer: Mixer, plan: Plan, tokens: Ids, top: int, timings: Timings) -> PromptScore:
    """The score from the probabilities of all tokens, where some source gives each of them one."""
    made: list[PromptToken] = []
    known = np.arange(mixer.info.vocab_size)
    state: dict[str, Any] = {}  # Any: as in knnlm.evidence.Stretch
    rows = max(1, WHOLE_NUMBERS // len(known))
    for start in range(0, len(tokens) - 1, rows):
        end = min(start + rows, len(tokens) - 1)
        positions = [np.arange(start, end, dtype=np.int32)]
        request = ForwardRequest([tokens], positions, full=True, keys=plan.needs_keys, statistics=plan.statistics)
        forward = await mixer.forward(request, timings)
        after, answers = await _answers(mixer, plan, tokens, (start, end), forward, state, timings, first=start)
        if after.degraded is not None:
            return await score_prompt(mixer, after, tokens, top, timings)
        lm = required(forward.log_probs)
        mixed = await asyncio.to_thread(mix_evidence, lm, plan.sources, answers, forward.statistics)
        targets = tokens[start + 1 : end + 1].tolist()
        made += [_token(t, known, mixed.log_probs[i], lm[i].astype(np.float64), top) for i, t in enumerate(targets)]
    return PromptScore(made, plan)


async def _answers(
    mixer: Mixer,
    plan: Plan,
    tokens: Ids,
    rows: tuple[int, int],
    forward: ForwardResult,
    state: dict[str, Any],  # Any: as in knnlm.evidence.Stretch
    timings: Timings,
    *,
    first: int = 0,
) -> tuple[Plan, list[Evidence]]:
    """What the sources say of the tokens behind the positions rows[0] to rows[1]. first: the first one of `forward`."""
    start, end = rows
    part = slice(start - first, end - first)
    keys = None if forward.keys is None else forward.keys[part]
    statistics = None if forward.statistics is None else forward.statistics.at(part)
    stretch = Stretch(tokens, 0, np.arange(start + 1, end + 1), state)
    return await mixer.answers(plan, Step([stretch], keys, statistics=statistics), timings)


def _token(
    target: int, known: npt.NDArray[np.int64], log_probs: npt.NDArray[np.float64], lm: npt.NDArray[np.float64], top: int
) -> PromptToken:
    at = int(np.flatnonzero(known == target)[0])
    order = np.lexsort((known, -log_probs))[:top]
    likeliest = list(zip(known[order].tolist(), log_probs[order].tolist(), strict=True))
    return PromptToken(target, float(log_probs[at]), float(lm[at]), likeliest)
