"""What a forward request must satisfy, and how its sequences are put into batches. Pure; knows no model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knnlm.errors import InvalidRequest
from knnlm.messages import ForwardRequest


@dataclass(frozen=True)
class Feed:
    """One sequence as the model is fed it. tokens: (t,) int64, up to the last asked position. positions: (p,) int64.

    Its answers are rows first_row ... first_row + p - 1 of the result.
    """

    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    first_row: int


def check(request: ForwardRequest, *, vocab_size: int, context_length: int) -> None:
    """Raises InvalidRequest, naming the field, its value and what was expected, for a request that no model answers."""
    if not any(request.wanted):
        raise InvalidRequest(
            "nothing is wanted: expected full, targets, top_n, keys, statistics, candidates or temperatures",
            param="full",
        )
    if not 0 <= request.top_n <= vocab_size:
        raise InvalidRequest(f"top_n must be 0 ... {vocab_size}, got {request.top_n}", param="top_n")
    if not len(request.tokens):
        raise InvalidRequest("tokens holds no sequence, expected at least 1", param="tokens")
    if len(request.tokens) != len(request.positions):
        raise InvalidRequest(
            f"positions has {len(request.positions)} arrays, expected one per sequence: {len(request.tokens)}",
            param="positions",
        )
    tokens, lengths = _joined(request.tokens, "tokens")
    if lengths.min() < 1 or lengths.max() > context_length:
        wrong = np.flatnonzero((lengths < 1) | (lengths > context_length))
        raise InvalidRequest(
            f"tokens[{wrong[0]}] has {lengths[wrong[0]]} tokens, expected 1 ... {context_length}", param="tokens"
        )
    _refuse_outside(tokens, lengths, vocab_size, "tokens")
    positions, counts = _joined(request.positions, "positions")
    _refuse_outside(positions, counts, np.repeat(lengths, counts), "positions")
    if counts.max() > 1:
        _refuse_falling(positions, counts, request)
    if request.targets is not None:
        targets, count = _joined([request.targets], "targets")
        if len(targets) != len(positions):
            raise InvalidRequest(
                f"targets has {len(targets)} tokens, expected one per position: {len(positions)}", param="targets"
            )
        _refuse_outside(targets, count, vocab_size, "targets")
    if request.candidates is not None:
        if len(request.candidates) != len(positions):
            raise InvalidRequest(
                f"candidates has {len(request.candidates)} arrays, expected one per position: {len(positions)}",
                param="candidates",
            )
        candidates, counts = _joined(request.candidates, "candidates")
        _refuse_outside(candidates, counts, vocab_size, "candidates")
    if request.temperatures is not None:
        _check_temperatures(request.temperatures, len(positions))


def _refuse_falling(positions: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], request: ForwardRequest) -> None:
    sequence = np.repeat(np.arange(len(counts)), counts)
    falls = np.flatnonzero((np.diff(positions) <= 0) & (np.diff(sequence) == 0))
    if len(falls):
        i = sequence[falls[0]]
        raise InvalidRequest(
            f"positions[{i}] must be ascending, got {request.positions[i].tolist()[:16]}", param="positions"
        )


def plan(request: ForwardRequest, *, vocab_size: int, context_length: int) -> list[Feed]:
    """The sequences to feed, in the request's order; those with no position asked are left out.

    Raises InvalidRequest as `check` does.
    """
    check(request, vocab_size=vocab_size, context_length=context_length)
    feeds: list[Feed] = []
    rows = 0
    for tokens, positions in zip(request.tokens, request.positions, strict=True):
        if len(positions):
            fed = np.asarray(tokens[: int(positions[-1]) + 1], np.int64)
            feeds.append(Feed(fed, np.asarray(positions, np.int64), rows))
        rows += len(positions)
    return feeds


def batches(feeds: Sequence[Feed], max_tokens: int) -> list[list[Feed]]:
    """Feeds of similar length together, longest first; rows x longest <= max_tokens unless one alone is longer."""
    grouped: list[list[Feed]] = []
    for feed in sorted(feeds, key=lambda f: -len(f.tokens)):
        if grouped and (len(grouped[-1]) + 1) * len(grouped[-1][0].tokens) <= max_tokens:
            grouped[-1].append(feed)
        else:
            grouped.append([feed])
    return grouped


def _check_temperatures(temperatures: npt.NDArray[np.float32], n: int) -> None:
    if temperatures.shape != (n,) or temperatures.dtype.kind not in "fiu":
        raise InvalidRequest(
            f"temperatures must be one number per position, ({n},), got {temperatures.dtype} {temperatures.shape}",
            param="temperatures",
        )
    wrong = np.flatnonzero(~(np.isfinite(temperatures) & (temperatures > 0)))
    if len(wrong):
        raise InvalidRequest(
            f"temperatures[{wrong[0]}] must be finite and > 0, got {temperatures[wrong[0]]}", param="temperatures"
        )


def _joined(parts: Sequence[npt.NDArray[np.int32]], name: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """All numbers one after another, (n,) int64, and how many each part has."""
    for i, part in enumerate(parts):
        if part.ndim != 1:
            raise InvalidRequest(f"{_part(name, i)} must have 1 dimension, got shape {part.shape}", param=name)
        if part.dtype.kind not in "iu" and len(part):
            raise InvalidRequest(f"{_part(name, i)} must hold integers, got {part.dtype}", param=name)
    flat = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int32), *parts])
    return flat.astype(np.int64, copy=False), np.array([len(part) for part in parts], np.int64)


def _refuse_outside(
    flat: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], upper: int | npt.NDArray[np.int64], name: str
) -> None:
    """upper: one for all numbers, or (n,) one for each; the first number that is not in 0 ... upper - 1 is named."""
    if len(flat) and (flat.min() < 0 or (flat >= upper).any()):
        at = int(np.flatnonzero((flat < 0) | (flat >= upper))[0])
        part = int(np.searchsorted(np.cumsum(lengths), at, side="right"))
        largest = np.broadcast_to(upper, flat.shape)[at] - 1
        raise InvalidRequest(f"{_part(name, part)} holds {flat[at]}, expected 0 ... {largest}", param=name)


def _part(name: str, number: int) -> str:
    return name if name == "targets" else f"{name}[{number}]"
