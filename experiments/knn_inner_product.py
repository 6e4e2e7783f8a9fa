"""Squared L2 or inner product: which of the two finds better neighbors.

The paper: L2 was better. Here: both exact, temperature and lambda fitted for each; L2 must not be worse. Keys behind
a norm are of about the same length, so the two may find the same neighbors: then the difference is within noise.
"""

import numpy as np

from experiments.approximate import recall
from experiments.curves import perplexity
from experiments.experiment import KNN_LM, Experiment, Need
from experiments.knn_precision import refitted
from experiments.lab import BASE, Lab, Sight
from experiments.records import Findings, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import lower
from knnlm.datastore.reader import Datastore
from knnlm.evaluation.splits import Part
from knnlm.neighbors import Neighbors

BLOCK = 512


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    """The base on the main corpus."""
    return [Sight(BASE, texts.main.name)]


def run(lab: Lab) -> Findings:
    """Two rows."""
    sight = Sight(BASE, lab.texts.main.name)
    view = lab.view(sight)
    tune, report = (_found(lab, sight, part) for part in (Part.TUNE, Part.REPORT))
    temperature, lmbda, loss = refitted(view, tune, report)
    keys = Datastore.open(lab.store(BASE, sight.corpus)).keys
    norms = np.linalg.norm(np.asarray(keys, np.float32), axis=1)
    table = Table(
        f"Base beside a datastore of {sight.corpus}",
        ("nearness", "perplexity", "lambda", "temperature", "share of the nearest by L2"),
        (("squared L2", perplexity(-view.mixed), view.lmbda, view.temperature, 1.0),
         ("inner product", perplexity(loss), lmbda, temperature, recall(report, view.report.neighbors))),
    )  # fmt: skip
    spread = f"Lengths of the keys: {norms.mean():.1f} on average, standard deviation {norms.std():.1f}."
    verdict = lower("L2 is better than the inner product", -view.mixed, loss, view.report.documents)
    return Findings((table,), (verdict,), notes=(spread,))


def _found(lab: Lab, sight: Sight, part: Part) -> Neighbors:
    """The k largest inner products, as distances below the largest of the query."""

    def make() -> dict[str, np.ndarray]:
        datastore = Datastore.open(lab.store(sight.learner, sight.corpus))
        keys = np.asarray(datastore.keys, np.float32)
        queries = np.asarray(lab.held(sight.learner, sight.corpus, part).queries, np.float32)
        k = min(lab.scale.k, len(keys))
        distances, ids = [], []
        for start in range(0, len(queries), BLOCK):
            products = queries[start : start + BLOCK] @ keys.T
            largest = np.argpartition(-products, k - 1, axis=1)[:, :k]
            values = np.take_along_axis(products, largest, axis=1)
            order = np.argsort(-values, axis=1, kind="stable")
            values = np.take_along_axis(values, order, axis=1)
            distances.append(values[:, :1] - values)
            ids.append(np.take_along_axis(largest, order, axis=1))
        found = np.concatenate(ids).astype(np.int64)
        return {"distances": np.concatenate(distances), "values": datastore.values_of(found), "ids": found}

    a = lab.kept(f"inner-product/{sight.learner.name}-{sight.corpus.replace(' ', '-')}-{part}", make)
    return Neighbors(a["distances"], a["values"], a["ids"])  # type: ignore[arg-type]


EXPERIMENT = Experiment("L2 or inner product", f"{KNN_LM}, section 4.1", __doc__, needs, run)
