"""Which stored entries a token's retrieved probability came from, and the documents they stand in. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knnlm.errors import InvalidRequest
from knnlm.messages import Passage
from knnlm.neighbors import Neighbors

BLOCK_NUMBERS = 1 << 20  # neighbors looked at a time


@dataclass(frozen=True)
class Carriers:
    """The neighbors that store each of n tokens, those with most of its retrieved mass first.

    rows: (m,) int64 ascending, the token. parts: (m,) int64, which set of neighbors. entries: (m,) int64. distances:
    (m,) float32. shares: (m,) float64, of the token's retrieved mass: those of all neighbors that store the token add
    up to one, and not all of them need be here.
    """

    rows: npt.NDArray[np.int64]
    parts: npt.NDArray[np.int64]
    entries: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]
    shares: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Carrier:
    """One entry that stores a token, with the text around it. share: of the token's retrieved mass. distance: squared
    L2."""

    domain: str
    passage: Passage
    distance: float
    share: float


@dataclass(frozen=True)
class DocumentShare:
    """What retrieval gave the tokens of a text from one document, as far as its entries were among the carriers.

    probability: sum over tokens of weight times p_kNN of the token times the shares of its entries here. share: of all
    that retrieval gave the text. tokens: how many of the text's.
    """

    domain: str
    document: str
    probability: float
    share: float
    tokens: int


def carriers(parts: Sequence[Neighbors], targets: npt.NDArray[np.integer], temperature: float, count: int) -> Carriers:
    """At most `count` carriers of each of the targets (n,), equally near ones in the order of `parts`.

    parts: sets of neighbors of the same n queries with ids, in one softmax. Raises InvalidRequest without ids.
    """
    ids = [part.ids for part in parts if part.ids is not None]
    if len(ids) != len(parts):
        raise InvalidRequest("neighbors have no ids: expected entry numbers", param="ids")
    widths = [part.values.shape[1] for part in parts]
    part_of = np.repeat(np.arange(len(parts)), widths)  # (k,) of all sets beside each other
    step = max(1, BLOCK_NUMBERS // max(1, sum(widths)))
    found = []
    for start in range(0, len(targets), step):
        block = slice(start, start + step)
        hits = np.concatenate([part.values[block] == targets[block, None] for part in parts], axis=1)
        row, column = np.nonzero(hits)
        distances = np.concatenate([part.distances[block] for part in parts], axis=1)[row, column]
        kept, shares = _nearest(row, distances, temperature, count)
        row, column = row[kept], column[kept]
        entries = np.concatenate([part[block] for part in ids], axis=1)[row, column]
        found.append((row + start, part_of[column], entries, distances[kept], shares))
    nothing = (np.empty(0, np.int64),) * 3 + (np.empty(0, np.float32), np.empty(0))
    return Carriers(*(np.concatenate(arrays) for arrays in zip(nothing, *found, strict=True)))


def document_shares(
    components: Sequence[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], Sequence[Sequence[Carrier]]]],
) -> list[DocumentShare]:
    """The documents that n tokens lean on, those that gave most first, then by domain and id.

    components: of each, the weight (n,), the log-probabilities of the tokens (n,) and the carriers of each token.
    """
    given: dict[tuple[str, str], dict[int, float]] = {}
    total = 0.0
    for weight, log_probs, carried in components:
        probability = weight * np.exp(log_probs)
        total += float(probability.sum())
        for i, entries in enumerate(carried):
            for entry in entries:
                tokens = given.setdefault((entry.domain, entry.passage.document), {})
                tokens[i] = tokens.get(i, 0.0) + float(probability[i]) * entry.share
    found = [
        DocumentShare(domain, document, sum(tokens.values()), _ratio(sum(tokens.values()), total), len(tokens))
        for (domain, document), tokens in given.items()
    ]
    return sorted(found, key=lambda d: (-d.probability, d.domain, d.document))


def _nearest(
    row: npt.NDArray[np.int64], distances: npt.NDArray[np.float32], temperature: float, count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Places of the `count` nearest of each row, by row and distance, and their shares of the row. row: ascending."""
    order = np.lexsort((distances, row))  # stable
    ordered, far = row[order], distances[order].astype(np.float64)
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    sizes = np.diff(np.append(starts, len(ordered)))
    weights = np.exp((np.repeat(far[starts], sizes) - far) / temperature)  # the nearest weighs 1
    if len(starts):
        weights /= np.repeat(np.add.reduceat(weights, starts), sizes)
    first = np.arange(len(ordered)) - np.repeat(starts, sizes) < count
    return order[first], weights[first]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
