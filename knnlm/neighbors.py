"""Neighbors and the distribution they give: arrays in, arrays out, log space, float64 accumulation.

A neighbor that was not found is padding: its value is -1. FAISS pads with id -1 and a huge distance; both are masked
here before anything is computed, because `values[-1]` is a real entry and exp(-huge / T) need not be zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knnlm.errors import InvalidRequest

MISSING_DISTANCE = np.finfo(np.float32).max  # the distance of padding
BLOCK_BYTES = 1 << 19  # float64 weights made at a time in scoring: they stay in a core's cache
MIN_TEMPERATURE = 1e-100  # no distance in float32, divided by it, overflows float64
COUNTED_PLACES = 1 << 18  # rows times tokens of a table that stays in a core's cache
TINY = 1e-290  # a share this small has lost digits, or all, to underflow


@dataclass(frozen=True)
class Neighbors:
    """For each of n queries, k entries, nearest first.

    distances: (n, k) float32, squared L2. values: (n, k) int32, the token each entry stores, -1 for padding.
    ids: (n, k) int64, entry numbers, -1 for padding; None where they were not asked for.
    """

    distances: npt.NDArray[np.float32]
    values: npt.NDArray[np.int32]
    ids: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.distances.ndim != 2 or self.distances.shape != self.values.shape:
            raise InvalidRequest(
                f"distances {self.distances.shape} and values {self.values.shape} must have one shape (n, k)"
            )
        if self.ids is not None and self.ids.shape != self.values.shape:
            raise InvalidRequest(f"ids {self.ids.shape} and values {self.values.shape} must have one shape (n, k)")

    @property
    def present(self) -> npt.NDArray[np.bool_]:
        """(n,) whether a query has any neighbor. Where it has none there is no distribution."""
        found: npt.NDArray[np.bool_] = self.values.max(axis=1, initial=-1) >= 0
        return found

    def log_weights(self, temperature: float) -> npt.NDArray[np.float64]:
        """(n, k) float64: -distance / T, and -inf for padding; not normalised."""
        _check_temperature(temperature)
        # inf - not FAISS's 3.4e38 - is what padding must become: 3.4e38 / T overflows for T < 1
        return np.where(self.values >= 0, self.distances.astype(np.float64) / -temperature, -np.inf)


@dataclass(frozen=True)
class TokenMasses:
    """n sparse vectors over tokens in log space: row i is tokens[offsets[i]:offsets[i+1]], ascending and distinct.

    offsets: (n + 1,) int64. tokens: (m,) int32. log_masses: (m,) float64. The masses of a row need not sum to one
    until `normalized`.
    """

    offsets: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    log_masses: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """(m,) the row that each mass belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def row(self, i: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
        """Tokens and log masses of row i, both empty when it has none."""
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[part], self.log_masses[part]

    def part(self, start: int, end: int) -> "TokenMasses":
        """Rows start ... end - 1."""
        kept = slice(self.offsets[start], self.offsets[end])
        offsets = self.offsets[start : end + 1] - self.offsets[start]
        return TokenMasses(offsets, self.tokens[kept], self.log_masses[kept])

    def normalized(self) -> "TokenMasses":
        """The same rows, each summing to one; an empty row stays empty."""
        totals = np.full(len(self), -np.inf)
        filled = np.flatnonzero(np.diff(self.offsets))
        if len(filled):
            totals[filled] = _log_sums(self.log_masses, self.offsets[filled])
        return TokenMasses(self.offsets, self.tokens, self.log_masses - totals[self.rows])

    def of(self, targets: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
        """(n,) the log mass of one token per row, -inf where the row does not hold it."""
        result = np.full(len(self), -np.inf)
        hits = np.flatnonzero(self.tokens == targets[self.rows])
        result[self.rows[hits]] = self.log_masses[hits]
        return result

    def dense(self, vocab_size: int) -> npt.NDArray[np.float64]:
        """(n, vocab_size) float64, -inf where a row holds no mass."""
        result = np.full((len(self), vocab_size), -np.inf)
        result[self.rows, self.tokens] = self.log_masses
        return result


def stacked(parts: Sequence[TokenMasses]) -> TokenMasses:
    """The rows of all parts, one below the other."""
    ends = np.cumsum([0, *(len(part.tokens) for part in parts)])
    offsets = [np.zeros(1, np.int64), *(part.offsets[1:] + end for part, end in zip(parts, ends, strict=False))]
    return TokenMasses(
        np.concatenate(offsets),
        np.concatenate([np.empty(0, np.int32), *(part.tokens for part in parts)]),
        np.concatenate([np.empty(0), *(part.log_masses for part in parts)]),
    )


def neighbor_log_probs(neighbors: Neighbors, temperature: float) -> TokenMasses:
    """p_kNN in log space (Khandelwal et al. 2020, arXiv 1911.00172, eq. 2, with a temperature): every row that is not
    empty sums to one."""
    _check_temperature(temperature)
    near = np.where(neighbors.values >= 0, -neighbors.distances.astype(np.float64), -np.inf)
    # from the nearest neighbor on, and only then divided: -16000 and its logarithm of a sum would cancel to 1e-12
    return token_masses(neighbors.values, (near - tops(near)) / temperature).normalized()


def token_masses(values: npt.NDArray[np.int32], log_weights: npt.NDArray[np.float64]) -> TokenMasses:
    """The log weights (n, k) of values (n, k), -1 for padding, added up by token in each row."""
    n, size = len(values), 1 + int(values.max(initial=-1))
    if n * size <= COUNTED_PLACES and log_weights.max(initial=-np.inf) <= 0:
        return _counted(values, log_weights, size)
    row, slot = np.nonzero(values >= 0)
    return _grouped(row, values[row, slot], log_weights[row, slot], n=n)


def target_log_probs(
    neighbors: Neighbors, targets: npt.NDArray[np.integer], temperature: float
) -> npt.NDArray[np.float64]:
    """(n,) log p_kNN of one token per query, without building the distribution. -inf where no neighbor stores it.

    targets: (n,). Equals `neighbor_log_probs(...).of(targets)`; several times cheaper, for scoring and tuning.
    """
    _check_temperature(temperature)
    n, k = neighbors.values.shape
    result = np.empty(n)
    step = max(1, BLOCK_BYTES // (8 * max(k, 1)))
    weights = np.empty((min(step, n), k))
    for start in range(0, n, step):
        rows = slice(start, start + step)
        some = Neighbors(neighbors.distances[rows], neighbors.values[rows])
        result[rows] = _target_shares(some, targets[rows], temperature, weights[: len(some.values)])
    return result


def merge(parts: Sequence[Neighbors], k: int) -> Neighbors:
    """The k nearest of several shards' neighbors. An id that comes twice counts once; ties go to the lower id.

    Ids must be global to the datastore (-1 stays -1: never add a shard's offset to padding).
    """
    if not parts or k < 1:
        raise InvalidRequest(f"expected at least one part and k >= 1, got {len(parts)} parts and k {k}")
    distances = np.concatenate([part.distances for part in parts], axis=1)
    values = np.concatenate([part.values for part in parts], axis=1)
    ids = None
    keys: tuple[npt.NDArray[np.generic], ...] = ()
    if all(part.ids is not None for part in parts):
        ids = np.concatenate([part.ids for part in parts if part.ids is not None], axis=1)
        values = np.where(_repeated(ids), -1, values).astype(np.int32)
        keys = (ids,)
    far = np.where(values >= 0, distances, np.inf)
    order = np.lexsort((*keys, far), axis=1)[:, :k]

    def take(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        return np.take_along_axis(array, order, axis=1)

    kept = take(values).astype(np.int32)
    return Neighbors(
        np.where(kept >= 0, take(distances), MISSING_DISTANCE).astype(np.float32),
        kept,
        None if ids is None else np.where(kept >= 0, take(ids), -1).astype(np.int64),
    )


def _check_temperature(temperature: float) -> None:
    if not MIN_TEMPERATURE <= temperature < np.inf:
        raise InvalidRequest(
            f"temperature must be > 0, got {temperature}; the least is {MIN_TEMPERATURE:g}", param="temperature"
        )


def _target_shares(
    neighbors: Neighbors,
    targets: npt.NDArray[np.integer],
    temperature: float,
    weights: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """(n,) log of what the neighbors with the target weigh, out of all; weights: (n, k), room to work in."""
    distances, values = neighbors.distances, neighbors.values
    padding = values < 0 if values.min(initial=0) < 0 else None
    if padding is not None:
        distances = np.where(padding, np.float32(np.inf), distances)
    nearest = distances.min(axis=1, initial=np.inf, keepdims=True)
    nearest[np.isinf(nearest)] = 0.0
    np.subtract(nearest, distances, out=weights, dtype=np.float64)
    weights /= temperature
    np.exp(weights, out=weights)
    total = weights.sum(axis=1)
    hits = values == targets[:, None]
    weights *= hits
    share = weights.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):  # log 0: nothing stores the target; 0 / 0: nothing was found
        result = np.where(total > 0, np.log(share / total), -np.inf)
    faint = np.flatnonzero((share < TINY) & (total > 0) & hits.any(axis=1))
    if len(faint):
        far = np.where(hits[faint], distances[faint], np.inf).astype(np.float64)
        logs = (nearest[faint] - far) / temperature
        result[faint] = np.logaddexp.reduce(logs, axis=1) - np.log(total[faint])
    return result


def tops(log_weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(n, 1) the largest of each row, 0 where none is finite."""
    largest: npt.NDArray[np.float64] = log_weights.max(axis=1, initial=-np.inf, keepdims=True)
    largest[~np.isfinite(largest)] = 0.0
    return largest


def _counted(values: npt.NDArray[np.int32], log_weights: npt.NDArray[np.float64], size: int) -> TokenMasses:
    """`token_masses` of tokens below `size` by adding up into a table of all (row, token), several times faster than by
    sorting. log_weights: none above 0."""
    n = len(values)
    kept = values >= 0
    place = (np.arange(n)[:, None] * size + values)[kept]
    logs = log_weights[kept]
    sums = np.bincount(place, np.exp(logs), n * size)
    present = np.flatnonzero(np.bincount(place, minlength=n * size))
    with np.errstate(divide="ignore"):
        masses = np.log(sums[present])
    faint = np.flatnonzero(sums[present] < TINY)
    if len(faint):
        largest = np.full(n * size, -np.inf)
        np.maximum.at(largest, place, logs)
        shift = largest[present[faint]]
        shift[~np.isfinite(shift)] = 0.0
        table = np.zeros(n * size)
        table[present[faint]] = shift
        again = np.bincount(place, np.exp(logs - table[place]), n * size)
        with np.errstate(divide="ignore"):
            masses[faint] = np.log(again[present[faint]]) + shift
    offsets = np.searchsorted(present, np.arange(n + 1) * size).astype(np.int64)
    return TokenMasses(offsets, (present % size).astype(np.int32), masses)


def _repeated(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """(n, k) True for every later occurrence of an id in its row, padding excepted."""
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=1)
    again = np.zeros(ids.shape, np.bool_)
    again[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    result = np.empty_like(again)
    np.put_along_axis(result, order, again, axis=1)
    return result


def _grouped(
    row: npt.NDArray[np.integer], token: npt.NDArray[np.integer], log_mass: npt.NDArray[np.float64], *, n: int
) -> TokenMasses:
    """Add up (row, token, log mass) triples that share row and token."""
    if not len(row):
        return TokenMasses(np.zeros(n + 1, np.int64), np.empty(0, np.int32), np.empty(0))
    place = row.astype(np.int64) << 32 | token.astype(np.int64)
    order = np.argsort(place, kind="stable")
    place = place[order]
    starts = np.flatnonzero(np.concatenate([[True], place[1:] != place[:-1]]))
    distinct = place[starts]
    offsets = np.searchsorted(distinct >> 32, np.arange(n + 1)).astype(np.int64)
    return TokenMasses(offsets, (distinct & 0xFFFFFFFF).astype(np.int32), _log_sums(log_mass[order], starts))


def _log_sums(values: npt.NDArray[np.float64], starts: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """log of the sum of exp over consecutive groups that begin at `starts` (the first is 0, none is empty)."""
    tops = np.maximum.reduceat(values, starts)
    tops[~np.isfinite(tops)] = 0.0
    spread = np.repeat(tops, np.diff(np.append(starts, len(values))))
    with np.errstate(divide="ignore"):
        sums: npt.NDArray[np.float64] = np.log(np.add.reduceat(np.exp(values - spread), starts)) + tops
    return sums
