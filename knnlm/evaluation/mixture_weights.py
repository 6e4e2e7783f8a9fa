"""The best weight of each component of a mixture on held-out documents: alone beside the LM, and all together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from knnlm.errors import InvalidRequest
from knnlm.evaluation.splits import Encoded
from knnlm.pipeline import Pipeline
from knnlm.scoring import Score
from knnlm.weights import fit_weights


@dataclass(frozen=True)
class Weighed:
    """The LM with some components: the name of each with its weight, and the perplexity per token."""

    weights: Mapping[str, float]
    perplexity: float


@dataclass(frozen=True)
class FittedWeights:
    """mixtures: the LM alone, with each component alone, and, of several, with all. tokens, documents: fitted to."""

    mixtures: Sequence[Weighed]
    tokens: int
    documents: int
    context_length: int
    min_context: int


def weigh(
    pipeline: Pipeline,
    documents: Sequence[Encoded],
    sources: Mapping[str, Any],  # Any: a record of options for each row of knnlm.sources.SOURCES
    *,
    context_length: int | None = None,
    min_context: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> FittedWeights:
    """The fitted weights of all components of these sources, each of which must weigh something in the options.

    Weights are the same for all predictions: what other rules would do is not looked at. on_progress: called with the
    tokens done. Raises InvalidRequest without a document or a component, and what Pipeline.score raises.
    """
    scores: list[Score] = []
    for document in documents:
        scores.append(pipeline.score(document.tokens, sources, context_length=context_length, min_context=min_context))
        if on_progress is not None:
            on_progress(sum(len(score.log_probs) for score in scores))
    if not scores:
        raise InvalidRequest("no document with at least two tokens", param="sources")
    names = [share.name for share in scores[0].mixed.components]
    if not names:
        raise InvalidRequest("there is nothing to weigh: name a domain or a memory, or mix the cache")
    lm = np.concatenate([score.lm_log_probs for score in scores])
    shares = [[score.mixed.components[i].evidence for score in scores] for i in range(len(names))]
    found = [np.concatenate([evidence.of_targets for evidence in parts]) for parts in shares]
    present = [np.concatenate([evidence.present for evidence in parts]) for parts in shares]
    chosen = [[], *([i] for i in range(len(names))), *([list(range(len(names)))] if len(names) > 1 else [])]
    mixtures = []
    for some in chosen:
        weights, loss = fit_weights(lm, [found[i] for i in some], [present[i] for i in some])
        fitted = {names[i]: float(weight) for i, weight in zip(some, weights, strict=True)}
        mixtures.append(Weighed(fitted, float(np.exp(loss))))
    return FittedWeights(mixtures, len(lm), len(scores), scores[0].context_length, scores[0].min_context)
