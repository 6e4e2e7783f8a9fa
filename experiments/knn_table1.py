"""Retrieval and the continuous cache, alone and together.

The paper (WikiText-103, test): 18.65 without, 18.27 with a continuous cache, 16.12 with the datastore, 15.79 with both.
The 2.9 points of its abstract include the cache; the datastore alone gives 2.53.

Here: both together must be better than either, either better than the model alone, and the datastore better than the
cache. The last need not be so with a small datastore, of which the text itself is soon a good part.
"""

import numpy as np

from experiments.curves import perplexity
from experiments.experiment import KNN_LM, Experiment, Need
from experiments.lab import Lab, Learner, Sight
from experiments.records import Findings, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import Verdict, lower
from knnlm.evaluation.cache_fit import fit_cache, past_log_probs, places_with_past
from knnlm.mixture import Component, mix
from knnlm.weights import fit_weights

PAPER = ("paper: WikiText-103, test", 18.65, 18.27, 16.12, 15.79)


def sights(texts: Texts) -> list[Sight]:
    """Models that know the kind of text, as the paper's does."""
    names = dict.fromkeys([texts.prose.name, texts.main.name])
    return [Sight(Learner(name), name, long=True) for name in names]


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    """Long stretches of held-out documents: a cache needs something to remember."""
    return [*sights(texts)]


def run(lab: Lab) -> Findings:
    """A row per corpus; all weights of a row are fitted together to other documents."""
    rows: list[tuple[str | float | None, ...]] = [PAPER]
    verdicts: list[Verdict] = []
    for sight in sights(lab.texts):
        view = lab.view(sight)
        cache = fit_cache(view.tune.held)
        parts = []
        for seen in (view.tune, view.report):
            found = {"cache": past_log_probs(seen.held, cache.theta, cache.size), "kNN": seen.knn(view.temperature)}
            present = {"cache": places_with_past(seen.held), "kNN": seen.neighbors.present}
            parts.append((seen.lm, found, present))
        (lm, fitted, there), (reported, seen_by, seen_there) = parts
        losses = {}
        for names in ((), ("cache",), ("kNN",), ("kNN", "cache")):
            weights, _ = fit_weights(lm, [fitted[n] for n in names], [there[n] for n in names])
            components = [
                Component(n, seen_by[n], np.where(seen_there[n], weight, 0.0))
                for n, weight in zip(names, weights, strict=True)
            ]
            losses[names] = -mix(reported, components)
        alone, cached, knn, both = losses.values()
        documents = view.report.documents
        rows.append((sight.corpus, *(perplexity(x) for x in (alone, cached, knn, both))))
        for claim, first, second in (
            ("both are better than the datastore alone", both, knn),
            ("both are better than the cache alone", both, cached),
            ("the datastore is better than the cache", knn, cached),
            ("the cache is better than nothing", cached, alone),
            ("the datastore is better than nothing", knn, alone),
        ):
            verdicts.append(lower(f"{claim}, {sight.corpus}", first, second, documents))
    columns = ("corpus", "LM", "LM + cache", "LM + datastore", "LM + both")
    return Findings((Table("Perplexity", columns, tuple(rows)),), tuple(verdicts))


EXPERIMENT = Experiment("Retrieval and the continuous cache", f"{KNN_LM}, Table 1", __doc__, needs, run)
