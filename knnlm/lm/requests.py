"""What a forward request must satisfy, and how its sequences are put into batches. Pure; knows no model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knnlm.errors import InvalidRequest
from knnlm.messages import ForwardRequest

__all__ = ["Feed", "batches", "plan"]


@dataclass(frozen=True)
class Feed:
    """One sequence as the model is fed it. tokens: (t,) int64, up to the last asked position. positions: (p,) int64.

    Its answers are rows first_row ... first_row + p - 1 of the result.
    """

    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    first_row: int


def plan(request: ForwardRequest, *, vocab_size: int, context_length: int) -> list[Feed]:
    """The sequences to feed, in the request's order; those with no position asked are left out.

    Raises InvalidRequest that names the field, its value and what was expected.
    """
    if not (request.full or request.targets is not None or request.top_n or request.keys):
        raise InvalidRequest("nothing is wanted: expected full, targets, top_n or keys", param="full")
    if not 0 <= request.top_n <= vocab_size:
        raise InvalidRequest(f"top_n must be 0 ... {vocab_size}, got {request.top_n}", param="top_n")
    if not len(request.tokens):
        raise InvalidRequest("tokens holds no sequence, expected at least 1", param="tokens")
    if len(request.tokens) != len(request.positions):
        raise InvalidRequest(
            f"positions has {len(request.positions)} arrays, expected one per sequence: {len(request.tokens)}",
            param="positions",
        )
    feeds: list[Feed] = []
    rows = 0
    for i, (sequence, wanted) in enumerate(zip(request.tokens, request.positions, strict=True)):
        tokens = _integers(sequence, f"tokens[{i}]", vocab_size)
        if not 1 <= len(tokens) <= context_length:
            raise InvalidRequest(
                f"tokens[{i}] has {len(tokens)} tokens, expected 1 ... {context_length}", param="tokens"
            )
        positions = _integers(wanted, f"positions[{i}]", len(tokens))
        if (positions[1:] <= positions[:-1]).any():
            raise InvalidRequest(f"positions[{i}] must be ascending, got {positions.tolist()[:16]}", param="positions")
        if len(positions):
            feeds.append(Feed(tokens[: positions[-1] + 1], positions, rows))
        rows += len(positions)
    if request.targets is not None and len(_integers(request.targets, "targets", vocab_size)) != rows:
        raise InvalidRequest(
            f"targets has {len(request.targets)} tokens, expected one per position: {rows}", param="targets"
        )
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


def _integers(values: npt.ArrayLike, name: str, upper: int) -> npt.NDArray[np.int64]:
    """(n,) int64 within 0 ... upper - 1."""
    param = name.partition("[")[0]
    array = np.asarray(values)
    if array.ndim != 1:
        raise InvalidRequest(f"{name} must have 1 dimension, got shape {array.shape}", param=param)
    if array.dtype.kind not in "iu" and len(array):
        raise InvalidRequest(f"{name} must hold integers, got {array.dtype}", param=param)
    outside = array[(array < 0) | (array >= upper)]
    if len(outside):
        raise InvalidRequest(f"{name} holds {outside[0]}, expected 0 ... {upper - 1}", param=param)
    return array.astype(np.int64)
