"""Which replica a sequence's steps go to, so that each finds what the one before has kept; requests in parts for it."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from knnlm.errors import Unavailable
from knnlm.messages import ForwardRequest, ForwardResult

MAX_KNOWN = 65_536  # sequences whose beginning is remembered

Tokens = npt.NDArray[np.int32]


class Beginnings:
    """What each sequence was when it was first seen: that stays the same in all its steps. Equal prompts begin equally,
    and so find each other; a sequence that is forgotten is taken for a new one."""

    def __init__(self, max_known: int = MAX_KNOWN) -> None:
        self._max_known = max_known
        self._known: OrderedDict[bytes, bytes] = OrderedDict()

    def of(self, tokens: Tokens) -> bytes:
        """16 bytes. tokens: of a sequence that was seen, of one with one token more, or of a new one."""
        name = _digest(tokens)
        beginning = self._known.get(name) or self._known.get(_digest(tokens[:-1])) or name
        self._known[name] = beginning
        self._known.move_to_end(name)
        if len(self._known) > self._max_known:
            self._known.popitem(last=False)
        return beginning


def highest(beginning: bytes, places: Iterable[str]) -> str:
    """The place of rendezvous hashing (Thaler and Ravishankar 1998): when one comes or goes, only its own move."""
    return max(places, key=lambda place: hashlib.blake2b(place.encode(), key=beginning, digest_size=8).digest())


def part(request: ForwardRequest, chosen: Sequence[int]) -> ForwardRequest:
    """The request for some of its sequences alone."""
    rows = _rows(request, chosen)
    return replace(
        request,
        tokens=[request.tokens[i] for i in chosen],
        positions=[request.positions[i] for i in chosen],
        targets=None if request.targets is None else request.targets[rows],
        candidates=None if request.candidates is None else [request.candidates[row] for row in rows],
        temperatures=None if request.temperatures is None else request.temperatures[rows],
    )


def joined(request: ForwardRequest, parts: Sequence[Sequence[int]], results: Sequence[ForwardResult]) -> ForwardResult:
    """The answer to a request from those to its parts. parts: the sequences in each. timings: the longest per stage.

    Raises Unavailable where they come from different models.
    """
    if len({result.fingerprint for result in results}) > 1:
        raise Unavailable("replicas of the lm service have different models now")
    rows = np.concatenate([_rows(request, chosen) for chosen in parts])
    counts = np.array([len(tokens) for tokens in request.candidates or ()], np.int64)
    begins = np.cumsum(counts) - counts
    values: dict[str, Any] = {}  # Any: of the fields' types
    for field in fields(ForwardResult):
        arrays = [getattr(result, field.name) for result in results]
        if not isinstance(arrays[0], np.ndarray):
            continue
        places = rows
        if field.name == "candidate_log_probs":
            moved = counts[rows]
            places = np.repeat(begins[rows] - np.cumsum(moved) + moved, moved) + np.arange(moved.sum())
        values[field.name] = together = np.empty_like(np.concatenate(arrays))
        together[places] = np.concatenate(arrays)
    stages = {stage for result in results for stage in result.timings}
    timings = {stage: max(result.timings.get(stage, 0.0) for result in results) for stage in sorted(stages)}
    return ForwardResult(**values, fingerprint=results[0].fingerprint, timings=timings)


def _rows(request: ForwardRequest, chosen: Sequence[int]) -> npt.NDArray[np.int64]:
    """The rows of these sequences in the request's answer."""
    counts = np.array([len(positions) for positions in request.positions], np.int64)
    begins = np.cumsum(counts) - counts
    return np.concatenate([np.empty(0, np.int64), *(begins[i] + np.arange(counts[i]) for i in chosen)])


def _digest(tokens: Tokens) -> bytes:
    return hashlib.blake2b(tokens.astype(np.int32, copy=False).tobytes(), digest_size=16).digest()
