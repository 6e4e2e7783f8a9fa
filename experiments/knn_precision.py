"""Exact distances beside those that an index reckons from codes.

The paper: 16.5 with quantised distances, 16.06 when neighbors are weighed by their true distances. Ours: an index of
the paper's kind (inverted lists, 16 dimensions a byte), once as it is, once rescored by the stored keys, and exact
search. Exact distances must be better than those of codes; candidates and everything else are the same.
"""

import numpy as np

from experiments.approximate import found, recall
from experiments.curves import perplexity
from experiments.experiment import KNN_LM, Experiment, Need
from experiments.lab import BASE, Floats, Lab, Sight, View, mixed
from experiments.records import Findings, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import lower
from knnlm.evaluation.splits import Part
from knnlm.evaluation.tuning import fit
from knnlm.neighbors import Neighbors, target_log_probs
from knnlm.options import SearchOptions

__all__ = ["refitted"]


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    """The base on the main corpus."""
    return [Sight(BASE, texts.main.name)]


def refitted(view: View, tune: Neighbors, report: Neighbors) -> tuple[float, float, Floats]:
    """Temperature, lambda and losses with other neighbors of the same tokens."""
    tuned = fit(view.tune.held.with_neighbors(tune)).tuning
    knn = target_log_probs(report, view.report.targets, tuned.temperature)
    return tuned.temperature, tuned.lmbda, -mixed(view.report.lm, knn, tuned.lmbda)


def run(lab: Lab) -> Findings:
    """A row per kind of distance."""
    sight = Sight(BASE, lab.texts.main.name)
    view = lab.view(sight)
    rows: list[tuple[str | float | None, ...]] = [
        ("paper: quantised distances, dev", 16.5, None, None, None),
        ("paper: exact distances, dev", 16.06, None, None, None)
    ]  # fmt: skip
    losses: dict[str, Floats] = {}
    for name, rescore in (("distances of codes", False), ("the same neighbors, exact distances", True)):
        options = SearchOptions(k=lab.scale.k, rescore=rescore, overfetch=1.0 if rescore else None)
        tune, report = (found(lab, sight, part, options) for part in (Part.TUNE, Part.REPORT))
        temperature, lmbda, losses[name] = refitted(view, tune, report)
        rows.append((name, perplexity(losses[name]), lmbda, temperature, recall(report, view.report.neighbors)))
    losses["exact search"] = -view.mixed
    rows.append(("exact search", perplexity(-view.mixed), view.lmbda, view.temperature, 1.0))
    rare, common = _by_frequency(lab, sight, view)
    codes, exact = losses["distances of codes"], losses["the same neighbors, exact distances"]
    frequency = Table(
        "Loss by distances of codes less that by exact ones, nats per token",
        ("tokens that the datastore holds", "tokens", "difference"),
        (("at most 32 times", int(rare.sum()), float((codes - exact)[rare].mean()) if rare.any() else None),
         ("more often", int(common.sum()), float((codes - exact)[common].mean()) if common.any() else None)),
    )  # fmt: skip
    documents = view.report.documents
    verdicts = (
        lower("exact distances are better than those of codes, of the same candidates", exact, codes, documents),
        lower("exact search is better than distances of codes", -view.mixed, codes, documents),
    )
    columns = ("distances", "perplexity", "lambda", "temperature", f"recall of the {lab.scale.k} nearest")
    return Findings((Table(f"Base beside a datastore of {sight.corpus}", columns, tuple(rows)), frequency), verdicts)


def _by_frequency(lab: Lab, sight: Sight, view: View) -> tuple[np.ndarray, np.ndarray]:
    values = np.load(lab.store(sight.learner, sight.corpus) / "values.npy", mmap_mode="r")
    counts = np.bincount(values, minlength=int(view.report.targets.max()) + 1)
    rare = counts[view.report.targets] <= 32
    return rare, ~rare


EXPERIMENT = Experiment("Precision of distances", f"{KNN_LM}, section 4.2", __doc__, needs, run)
