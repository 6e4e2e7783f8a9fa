"""theta, size and weight of the continuous cache (Grave et al. 2017, arXiv 1612.04426), fitted to held-out documents.

theta multiplies dot products of keys, so it is searched on a logarithmic grid in units of one over their mean squared
norm and refined by golden section; weights are solved. Each document is a text of its own.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import numpy.typing as npt

from knnlm.cache import cache_evidence
from knnlm.cache_source import DEFAULT_SIZE
from knnlm.domains import knn_evidence
from knnlm.errors import InvalidRequest
from knnlm.evaluation.collect import HeldOut, observe
from knnlm.evaluation.rule_choice import FOLDS, compare_together
from knnlm.evaluation.splits import encode, sample
from knnlm.evaluation.tuning import RELATIVE_TOLERANCE, golden_section
from knnlm.evidence import Evidence
from knnlm.messages import Document
from knnlm.neighbors import Neighbors
from knnlm.rules import CACHE_GATE, GATE, KNN_GATE, LOOKING, Observed, Parameters
from knnlm.tuning_records import RuleQuality
from knnlm.weights import fit_gates, fit_weights

THETAS = 2.0 ** np.arange(-3, 11)  # over the mean squared norm of the keys
SIZES = (125, 250, 500, 1000)  # places; and DEFAULT_SIZE

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CacheFit:
    """lmbda: the weight of the cache, and knn_lambda that of retrieval beside it; None where it was fitted alone.

    Perplexities of the held-out tokens: of the LM, with the cache alone, with retrieval alone at one lambda, with both.
    compared: one weight for each of both beside a gate for each, on documents that neither was fitted to; empty where
    that could not be. gates: the parameters of these, as tuning_records.Tuning names them, where they were chosen.
    """

    lmbda: float
    theta: float
    size: int
    lm_perplexity: float
    cache_perplexity: float
    knn_lambda: float | None = None
    knn_perplexity: float | None = None
    both_perplexity: float | None = None
    compared: Sequence[RuleQuality] = ()
    gates: Parameters = field(default_factory=dict)

    @property
    def parameters(self) -> Parameters:
        """The parameters as knnlm.tuning_records.Tuning stores them."""
        beside = {} if self.knn_lambda is None else {"knn_lambda": self.knn_lambda}
        return {"lambda": self.lmbda, "theta": self.theta, "size": float(self.size), **beside, **self.gates}


def fit_cache(
    held_out: HeldOut, neighbors: Neighbors | None = None, temperature: float = 1.0, *, gates: bool = False
) -> CacheFit:
    """The cache that makes the held-out tokens likeliest: theta and size beside the LM alone; then its weight, together
    with that of retrieval where neighbors of the same queries are given.

    gates: also compare one weight for each of both with a gate for each, fitted together, and take the better one
    (knnlm.evaluation.rule_choice.compare_together); this needs statistics of the LM and enough documents. The smallest
    size within a thousandth of the best perplexity is taken, among those that texts are at least twice as long as and
    DEFAULT_SIZE. Raises InvalidRequest where it is not known which tokens make a document.
    """
    lm, later = held_out.lm_log_probs, places_with_past(held_out)
    mean_norm = float(np.einsum("nd,nd->n", held_out.queries, held_out.queries, dtype=np.float64).mean()) or 1.0
    found: dict[tuple[float, int], tuple[float, Floats]] = {}

    def loss(log_theta: float, size: int = DEFAULT_SIZE) -> float:
        if (log_theta, size) not in found:
            log_probs = past_log_probs(held_out, float(np.exp(log_theta)), size)
            found[log_theta, size] = fit_weights(lm, [log_probs], [later])[1], log_probs
        return found[log_theta, size][0]

    grid = np.log(THETAS / mean_norm)
    best = int(np.argmin([loss(t) for t in grid]))
    golden_section(loss, float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)]))
    log_theta = min(found, key=lambda key: found[key][0])[0]
    longest = int(np.bincount(_numbers(held_out)).max())
    sizes = [size for size in SIZES if 2 * size <= longest] + [DEFAULT_SIZE]
    limit = min(loss(log_theta, size) for size in sizes) + np.log1p(RELATIVE_TOLERANCE)
    size = next(size for size in sizes if loss(log_theta, size) <= limit)
    cache = found[log_theta, size][1]
    (lmbda,), cache_loss = fit_weights(lm, [cache], [later])
    lm_loss = -float(lm.mean(dtype=np.float64))
    fitted = (float(np.exp(log_theta)), size, float(np.exp(lm_loss)), float(np.exp(cache_loss)))
    if neighbors is None:
        return CacheFit(float(lmbda), *fitted)
    both = seen_together(held_out, neighbors, temperature, fitted[0], size)
    log_probs, present = [seen.evidence.of_targets for seen in both], [seen.evidence.present for seen in both]
    _, knn_loss = fit_weights(lm, log_probs[:1], present[:1])
    (knn_lambda, lmbda), both_loss = fit_weights(lm, log_probs, present)
    weighed = (float(knn_lambda), float(np.exp(knn_loss)), float(np.exp(both_loss)))
    if not gates or held_out.statistics is None or len(np.unique(both[0].groups)) < FOLDS:
        return CacheFit(float(lmbda), *fitted, *weighed)
    compared = compare_together(both)
    chosen: dict[str, float | Sequence[float]] = {}
    if any(row.chosen and row.name == GATE for row in compared):
        for prefix, gate in zip((KNN_GATE, CACHE_GATE), fit_gates(both, [knn_lambda, lmbda]), strict=True):
            chosen |= {prefix + name: value for name, value in gate.items()}
    return CacheFit(float(lmbda), *fitted, *weighed, compared, chosen)


def seen_together(
    held_out: HeldOut, neighbors: Neighbors, temperature: float, theta: float, size: int
) -> tuple[Observed, Observed]:
    """What was seen of retrieval and of the cache, with the features of gates where there are statistics of the LM."""
    names = LOOKING.features if held_out.statistics is not None else ()
    cache, columns = past_evidence(held_out, theta, size, features=bool(names))
    found = (
        knn_evidence(neighbors, temperature, held_out.targets, names),
        Evidence(places_with_past(held_out), cache, columns),
    )
    lm = None if held_out.statistics is None else replace(held_out.statistics, keys=None)
    rest = (lm, held_out.document_of)
    knn, past = (Observed(held_out.lm_log_probs, evidence, *rest) for evidence in found)
    return knn, past


def tune_cache(
    documents: Iterable[Document],
    model: str,
    *,
    max_tokens: int = 20_000,
    context_length: int | None = None,
    min_context: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    on_progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> tuple[CacheFit, int, int]:
    """The cache beside the LM alone, fitted to a sample of the documents; and the tokens and documents of that. Nothing
    is stored. The rest as in knnlm.evaluation.search_settings.tune. Raises InvalidRequest without documents, and as
    LanguageModel.load does."""
    from knnlm.lm.model import LanguageModel

    lm = LanguageModel.load(model, device=device, dtype=dtype)
    few = sample(encode(documents, lm.tokenizer), lm.tokenizer, max_tokens)
    tokens = sum(len(d.tokens) - 1 for d in few)
    observed = observe(
        lm,
        few,
        context_length=context_length,
        min_context=min_context,
        on_progress=lambda done: on_progress(done, tokens),
    )
    return fit_cache(observed), tokens, len(few)


def past_log_probs(held_out: HeldOut, theta: float, size: int) -> Floats:
    """(n,) log p_cache of every held-out token, each document its own text; -inf where nothing stands before."""
    return past_evidence(held_out, theta, size)[0]


def past_evidence(
    held_out: HeldOut, theta: float, size: int, *, features: bool = False
) -> tuple[Floats, dict[str, Floats]]:
    """`past_log_probs`, and the features of knnlm.cache.cache_evidence, (n,) each, where they are wanted."""
    numbers = _numbers(held_out)
    result, columns = np.empty(len(numbers)), []
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(numbers)], strict=True):
        rows = slice(start, end)
        tokens = held_out.targets[rows]
        found, looked_at = cache_evidence(
            held_out.queries[rows], tokens, 0, theta=theta, size=size, targets=tokens, features=features
        )
        result[rows] = cast(Floats, found)  # targets were given, so these are not whole distributions
        columns.append(looked_at)
    return result, {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}


def places_with_past(held_out: HeldOut) -> npt.NDArray[np.bool_]:
    """(n,) whether a token of the document stands before: of the first one the cache knows nothing."""
    later: npt.NDArray[np.bool_] = np.diff(_numbers(held_out), prepend=-1) == 0
    return later


def _numbers(held_out: HeldOut) -> npt.NDArray[np.int64]:
    """(n,) documents, from 0 on, in the order of the tokens."""
    if held_out.document_of is None:
        raise InvalidRequest("a cache is fitted to documents, which are not known of these tokens", param="cache")
    return np.unique(held_out.document_of, return_inverse=True)[1]
