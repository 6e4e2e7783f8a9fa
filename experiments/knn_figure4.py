"""How many neighbors: perplexity against k.

The paper (read off its figure): 17.96 without, 17.6 with one neighbor, 17.3 with 2, 16.8 with 8, 16.3 with 64, 16.2
with 256, 16.06 with 1024: better with each, like a logarithm, and with 8 neighbors about half of the gain is there.

Here: it must fall from each k to the next (temperature and lambda are fitted for each), and with 8 neighbors a good
part of the gain must be there. All k are prefixes of one search.
"""

import numpy as np

from experiments.curves import line, perplexity, with_k
from experiments.experiment import KNN_LM, Experiment, Need
from experiments.lab import BASE, Lab, Sight, mixed
from experiments.records import Chart, Findings, Line, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import falls, lower

PAPER = {1: 17.6, 2: 17.3, 8: 16.8, 64: 16.3, 256: 16.2, 1024: 16.06}
KS = (1, 2, 4, 8, 16, 64, 256, 1024)


def most(corpus: str, scale: Scale) -> Sight:
    """The base beside its datastore, searched for the most neighbors."""
    return Sight(BASE, corpus, k=scale.most_k if scale.most_k != scale.k else None)


def needs(texts: Texts, scale: Scale) -> list[Need]:
    """One search with the most neighbors."""
    return [most(texts.main.name, scale)]


def run(lab: Lab) -> Findings:
    """A row per k."""
    view = lab.view(most(lab.texts.main.name, lab.scale))
    documents, lm = view.report.documents, view.report.lm
    ks = [k for k in KS if k <= lab.scale.most_k]
    found = [with_k(view, k) for k in ks]
    losses = [loss for _, _, loss in found]
    fixed = [-mixed(lm, view.report.knn(view.temperature, k), view.lmbda) for k in ks]
    gain = (-lm - losses[-1]).mean()
    rows = [("none", 17.96, perplexity(-lm), perplexity(-lm), None, None, 0.0)] + [
        (
            str(k),
            PAPER.get(k),
            perplexity(loss),
            perplexity(same),
            lmbda,
            temperature,
            float((-lm - loss).mean() / gain),
        )
        for k, (temperature, lmbda, loss), same in zip(ks, found, fixed, strict=True)
    ]
    table = Table(
        f"Perplexity by the number of neighbors, base beside a datastore of {lab.texts.main.name}",
        (
            "k",
            "paper (dev)",
            "fitted for each k",
            "fitted for the last k",
            "lambda",
            "temperature",
            "share of the gain",
        ),
        tuple(rows),
    )
    chart = Chart(
        "k", f"Perplexity against k, {lab.texts.main.name}", "k (neighbors)", "perplexity",
        (line("fitted for each k", ks, losses, documents), Line("fitted for the last k", tuple(map(float, ks)),
         tuple(float(np.exp(x.mean())) for x in fixed))), log_x=True,
    )  # fmt: skip
    half = -lm + 0.5 * (losses[-1] + lm)
    verdicts = (
        falls("perplexity falls with every more neighbors", losses, documents),
        lower("one neighbor is better than none", losses[0], -lm, documents),
        lower("eight neighbors give more than half of the gain", losses[ks.index(8)], half, documents),
    )
    return Findings((table,), verdicts, (chart,))


EXPERIMENT = Experiment("Number of neighbors", f"{KNN_LM}, Figure 4", __doc__, needs, run)
