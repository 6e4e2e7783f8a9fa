"""What the model says about held-out documents, asked once; and what searches find for the same tokens, as served.

Windows are those of scoring (knnlm/mixer.py), so a fitted value holds for what it was fitted to.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knnlm.decoding import Window, choose_windows, plan_fed_windows
from knnlm.errors import InvalidRequest
from knnlm.evaluation.splits import Encoded
from knnlm.evaluation.tuning import Observations
from knnlm.messages import DomainInfo, ForwardRequest, ForwardResult, LmStatistics, SearchRequest, required
from knnlm.neighbors import Neighbors
from knnlm.options import SearchOptions
from knnlm.protocols import LanguageModel, Searching

# How far, in squared norms of the query, a key lies from the same text's stored one. In float32 what is left is the
# rounding to float16, 5e-8; other text was never nearer than 4e-5, even to a model that has hardly been trained. Halves
# differ by up to their own rounding from one batch to the next.
SAME_KEY = 4e-6
SAME_HALF_KEY = 1e-4
LEAK_CONTEXT = 16  # tokens before a query that counts, where there are so long documents: many texts begin alike
LEAK_SEARCH = SearchOptions(k=8, rescore=True)  # true distances, however the domain is searched otherwise
LEAK_ALARM = 0.05  # share of coinciding queries from which on a report warns
BLOCK_ROWS = 512  # queries searched at a time

Batch = list[tuple[Encoded, Window]]


@dataclass(frozen=True)
class HeldOut:
    """What the model alone says about n held-out tokens of `documents` documents.

    queries: (n, d), in the dtype of the model's keys. lm_log_probs: (n,). targets: (n,). depths: (n,) tokens of the
    document before each; None where they are not known. statistics: of n distributions, None where not asked for.
    document_of: (n,) the number of each token's document; None where it is not known.
    """

    queries: npt.NDArray[np.floating]
    lm_log_probs: npt.NDArray[np.float32]
    targets: npt.NDArray[np.int32]
    documents: int
    depths: npt.NDArray[np.int64] | None = None
    statistics: LmStatistics | None = None
    document_of: npt.NDArray[np.int64] | None = None

    def sample(self, n: int) -> "HeldOut":
        """An even sample of n tokens, all where there are no more."""
        total = len(self.targets)
        if total <= n:
            return self
        rows = np.arange(n) * total // n
        depths = None if self.depths is None else self.depths[rows]
        lm = self.statistics
        return HeldOut(
            self.queries[rows],
            self.lm_log_probs[rows],
            self.targets[rows],
            self.documents,
            depths,
            None if lm is None else lm.at(rows),
            None if self.document_of is None else self.document_of[rows],
        )

    def with_neighbors(self, neighbors: Neighbors) -> Observations:
        return Observations(
            self.lm_log_probs, self.targets, neighbors, self.documents, self.statistics, self.document_of
        )


def observe(
    lm: LanguageModel,
    documents: Sequence[Encoded],
    *,
    domains: Sequence[DomainInfo] = (),
    context_length: int | None = None,
    min_context: int | None = None,
    statistics: bool = False,
    batch_tokens: int = 4096,
    on_progress: Callable[[int], None] | None = None,
) -> HeldOut:
    """Every token of `documents` but the first of each: its log-probability, and the key of its context.

    domains, context_length, min_context: see `choose_windows`. statistics: also those of the model's distributions, at
    which some rules look. on_progress: called with the tokens done so far. Memory: a key per token. Raises
    InvalidRequest when there is no token.
    """
    chosen = choose_windows(lm.info, domains, context_length, min_context)
    windows = (*chosen, domains[0].window_bos_token_id if domains else None)
    keys, log_probs, targets, depths, numbers = [], [], [], [], []
    number_of = {id(document): number for number, document in enumerate(documents)}
    entropies, largest = [], []
    done = 0
    for batch in _batches(documents, windows, batch_tokens):
        expected = np.concatenate([d.tokens[w.first : w.end] for d, w in batch])  # (n,) int32
        answer = _asked(lm, batch, expected, statistics)
        keys.append(required(answer.keys))
        log_probs.append(required(answer.target_log_probs))
        targets.append(expected)
        if statistics:
            entropies.append(required(answer.entropy))
            largest.append(required(answer.largest_log_prob))
        depths += [np.arange(w.first, w.end) for _, w in batch]
        numbers += [np.full(w.end - w.first, number_of[id(d)]) for d, w in batch]
        done += len(expected)
        if on_progress is not None:
            on_progress(done)
    if not done:
        raise InvalidRequest("no document with at least two tokens", param="sources")
    made = (np.concatenate(keys), np.concatenate(log_probs), np.concatenate(targets))
    lm_statistics = LmStatistics(np.concatenate(entropies), np.concatenate(largest), made[0]) if statistics else None
    return HeldOut(*made, len(documents), np.concatenate(depths), lm_statistics, np.concatenate(numbers))


def find(
    search: Searching,
    domain: str,
    held_out: HeldOut,
    options: SearchOptions,
    *,
    exclude_entries: npt.NDArray[np.int64] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Observations:
    """What requests with these options are answered for every query of `held_out`: the same candidates are considered.

    `search` answers for `domain`. exclude_entries: (n,) see SearchRequest. on_progress: called with the queries done so
    far. Memory: 8 bytes per query and neighbor. Raises what searching raises.
    """
    n = len(held_out.queries)
    distances = values = None
    for start in range(0, n, BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, n))
        own = None if exclude_entries is None else exclude_entries[rows]
        found = search.search(SearchRequest(domain, held_out.queries[rows], options, exclude_entries=own)).neighbors
        if distances is None or values is None:
            shape = (n, found.values.shape[1])
            distances, values = np.empty(shape, np.float32), np.empty(shape, np.int32)
        distances[rows], values[rows] = found.distances, found.values
        if on_progress is not None:
            on_progress(rows.stop)
    if distances is None or values is None:
        raise InvalidRequest("there is no query to search for", param="queries")
    return held_out.with_neighbors(Neighbors(distances, values))


def leak(held_out: HeldOut, neighbors: Neighbors, *dtypes: str | None) -> float:
    """The share of the queries that coincide with a stored key. neighbors: as LEAK_SEARCH finds them.

    dtypes: of the model that made the queries and of the one that made the keys; None, not recorded, may have been any.
    What one of them rounded to a half is no nearer than that. Only queries with LEAK_CONTEXT tokens before them count,
    unless there are none: very short documents may all be copies.
    """
    hits = coincide(held_out.queries, neighbors, SAME_KEY if set(dtypes) == {"float32"} else SAME_HALF_KEY)
    counted = np.ones(len(hits), np.bool_) if held_out.depths is None else held_out.depths >= LEAK_CONTEXT
    return float(hits[counted].mean() if counted.any() else hits.mean())


def coincide(queries: npt.NDArray[np.floating], neighbors: Neighbors, same: float) -> npt.NDArray[np.bool_]:
    """(n,) whether a query (n, d) is a stored key, up to `same` of its squared norm: its text is probably stored."""
    nearest = np.where(neighbors.values >= 0, neighbors.distances, np.inf).min(axis=1, initial=np.inf)
    norms = np.einsum("nd,nd->n", queries, queries, dtype=np.float64)
    found: npt.NDArray[np.bool_] = nearest <= same * norms
    return found


def _asked(lm: LanguageModel, batch: Batch, targets: npt.NDArray[np.int32], statistics: bool) -> ForwardResult:
    request = ForwardRequest(
        tokens=[w.fed(d.tokens) for d, w in batch],
        positions=[w.positions for _, w in batch],
        targets=targets,
        keys=True,
        statistics=statistics,
    )
    return lm.forward(request)


def _batches(documents: Sequence[Encoded], windows: tuple[int, int, int | None], batch_tokens: int) -> Iterator[Batch]:
    """Consecutive windows of all documents that hold at most `batch_tokens` tokens together, or one window."""
    batch: Batch = []
    size = 0
    for document in documents:
        for window in plan_fed_windows(len(document.tokens), *windows):
            length = len(window)
            if batch and size + length > batch_tokens:
                yield batch
                batch, size = [], 0
            batch.append((document, window))
            size += length
    if batch:
        yield batch
