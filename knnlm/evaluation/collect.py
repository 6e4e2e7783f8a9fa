"""The model and the search, run once over held-out documents; what they say is kept for tuning to fit.

Windows are those of scoring (knnlm/mixer.py), so a fitted value holds for what it was fitted to.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knnlm.datastore.encode import KeyEncoder
from knnlm.decoding import Window, plan_windows
from knnlm.errors import InvalidRequest, ModelError
from knnlm.evaluation.splits import Encoded
from knnlm.evaluation.tuning import Observations
from knnlm.messages import ForwardRequest, SearchRequest
from knnlm.neighbors import Neighbors
from knnlm.pipeline import Search

__all__ = ["LEAK_ALARM", "HeldOut", "coincide", "collect", "observe"]

# How far, in squared norms of the query, a key lies from the same text's stored one. In float32 what is left is the
# rounding to float16, 5e-8; other text was never nearer than 4e-5, even to a model that has hardly been trained. Halves
# differ by up to their own rounding from one batch to the next.
SAME = {"float32": 4e-6}
SAME_HALF = 1e-4
LEAK_CONTEXT = 16  # tokens before a query that counts, where there are so long documents: many texts begin alike
LEAK_ALARM = 0.05  # share of coinciding queries from which on a report warns

Batch = list[tuple[Encoded, Window]]
Answer = tuple[npt.NDArray[np.floating], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class HeldOut:
    """What the model alone says about n held-out tokens: queries (n, d) float32, lm_log_probs (n,), targets (n,)."""

    queries: npt.NDArray[np.float32]
    lm_log_probs: npt.NDArray[np.float32]
    targets: npt.NDArray[np.int32]
    documents: int


def observe(
    lm: KeyEncoder,
    documents: Sequence[Encoded],
    *,
    min_context: int | None = None,
    batch_tokens: int = 4096,
    on_progress: Callable[[int], None] | None = None,
) -> HeldOut:
    """`collect` without a search: queries to be searched for in several ways. Parameters and errors are its own."""
    keys, log_probs, targets = [], [], []
    done = 0
    for _, expected, (queries, answered) in _answers(lm, documents, min_context, batch_tokens):
        keys.append(queries.astype(np.float32))
        log_probs.append(answered)
        targets.append(expected)
        done += len(expected)
        if on_progress is not None:
            on_progress(done)
    if not done:
        raise InvalidRequest("no document with at least two tokens", param="sources")
    return HeldOut(np.concatenate(keys), np.concatenate(log_probs), np.concatenate(targets), len(documents))


def collect(
    lm: KeyEncoder,
    search: Search,
    domain: str,
    documents: Sequence[Encoded],
    *,
    k: int,
    min_context: int | None = None,
    batch_tokens: int = 4096,
    on_progress: Callable[[int], None] | None = None,
) -> Observations:
    """Every token of `documents` but the first of each: its log-probability, k neighbors of its context, itself.

    `search` answers for `domain`. min_context: as in `Mixer.score`. on_progress: called with the tokens done so far.
    Memory: 16 bytes per token and neighbor. Raises InvalidRequest when there is no token.
    """
    same = SAME.get(lm.info.dtype, SAME_HALF)
    log_probs, targets, distances, values, coinciding, deep = [], [], [], [], [], []
    done = 0
    for batch, expected, (keys, answered) in _answers(lm, documents, min_context, batch_tokens):
        found = search.search(SearchRequest(domain=domain, queries=keys, k=k)).neighbors
        log_probs.append(answered)
        targets.append(expected)
        distances.append(found.distances)
        values.append(found.values)
        coinciding.append(coincide(keys, found, same))
        deep.append(np.concatenate([np.arange(w.first, w.end) >= LEAK_CONTEXT for _, w in batch]))
        done += len(expected)
        if on_progress is not None:
            on_progress(done)
    if not done:
        raise InvalidRequest("no document with at least two tokens", param="sources")
    return Observations(
        lm_log_probs=np.concatenate(log_probs),
        targets=np.concatenate(targets),
        neighbors=Neighbors(np.concatenate(distances), np.concatenate(values)),
        documents=len(documents),
        leak=_share(np.concatenate(coinciding), np.concatenate(deep)),
    )


def coincide(queries: npt.NDArray[np.floating], neighbors: Neighbors, same: float) -> npt.NDArray[np.bool_]:
    """(n,) whether a query (n, d) is a stored key, up to `same` of its squared norm: its text is probably stored."""
    nearest = np.where(neighbors.values >= 0, neighbors.distances, np.inf).min(axis=1, initial=np.inf)
    norms = np.einsum("nd,nd->n", queries, queries, dtype=np.float64)
    found: npt.NDArray[np.bool_] = nearest <= same * norms
    return found


def _share(hits: npt.NDArray[np.bool_], counted: npt.NDArray[np.bool_]) -> float:
    """Of the counted ones; of all where none is: very short documents may all be copies."""
    return float(hits[counted].mean() if counted.any() else hits.mean())


def _answers(
    lm: KeyEncoder, documents: Sequence[Encoded], min_context: int | None, batch_tokens: int
) -> Iterator[tuple[Batch, npt.NDArray[np.int32], Answer]]:
    """Windows, the (n,) tokens that they predict, and what the model says: (keys (n, d), log-probabilities (n,))."""
    context = lm.info.context_length
    least = context // 2 if min_context is None else min_context
    for batch in _batches(documents, context, least, batch_tokens):
        expected = np.concatenate([d.tokens[w.first : w.end] for d, w in batch])  # (n,) int32
        forward = lm.forward(
            ForwardRequest(
                tokens=[d.tokens[w.start : w.end] for d, w in batch],
                positions=[w.positions for _, w in batch],
                targets=expected,
                keys=True,
            )
        )
        if forward.target_log_probs is None or forward.keys is None:
            raise ModelError(f"model {lm.info.model_id} did not answer with log-probabilities and keys")
        yield batch, expected, (forward.keys, forward.target_log_probs)


def _batches(documents: Sequence[Encoded], context: int, min_context: int, batch_tokens: int) -> Iterator[Batch]:
    """The windows of all documents in order, so many at a time that they hold at most `batch_tokens`, or one."""
    batch: Batch = []
    size = 0
    for document in documents:
        for window in plan_windows(len(document.tokens), context, min_context):
            length = window.end - window.start
            if batch and size + length > batch_tokens:
                yield batch
                batch, size = [], 0
            batch.append((document, window))
            size += length
    if batch:
        yield batch
