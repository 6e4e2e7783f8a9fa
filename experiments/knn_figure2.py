"""The size of the datastore: perplexity, and the best lambda, against the share of the documents that is stored.

The paper: with .1 to 3 billion entries perplexity falls with every more, without an end in sight, and the best lambda
grows from .25 (.2 billion) to .55 (3 billion), read off its figures.

Here: halves of the stored documents, each a part of the next larger, in several random orders; temperature and lambda
are fitted for each. Perplexity must fall with size, and the best lambda must not shrink.
"""

import numpy as np

from experiments.curves import LAMBDAS, line, over_lambda, perplexity
from experiments.experiment import KNN_LM, Experiment, Need
from experiments.lab import BASE, Lab, Sight
from experiments.records import Chart, Findings, Line, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import falls, further_right, lower

PAPER_LAMBDAS = ".2 billion .25, .4 .35, .8 .45, 1.6 .45, 3 .55"


def sights(corpus: str, scale: Scale) -> dict[float, list[Sight]]:
    """By share: one for every order, a single one for all documents."""
    return {
        share: [Sight(BASE, corpus, share=share, draw=draw) for draw in range(scale.draws if share < 1 else 1)]
        for share in scale.shares
    }


def needs(texts: Texts, scale: Scale) -> list[Need]:
    """Every share in every order."""
    return [sight for group in sights(texts.main.name, scale).values() for sight in group]


def run(lab: Lab) -> Findings:
    """Averages over the orders."""
    corpus = lab.texts.main.name
    rows, losses, curves, lambdas = [], [], [], []
    for share, group in sights(corpus, lab.scale).items():
        views = [lab.view(sight) for sight in group]
        documents, lm = views[0].report.documents, views[0].report.lm
        losses.append(np.mean([-view.mixed for view in views], axis=0))
        curves.append(np.mean([over_lambda(view.report.lm, view.knn) for view in views], axis=0))
        lambdas.append(float(np.mean([view.lmbda for view in views])))
        single = [perplexity(-view.mixed) for view in views]
        at_fixed = perplexity(curves[-1][LAMBDAS.index(0.25)])
        entries = lab.stored_tokens(corpus, share)
        rows.append((entries, perplexity(losses[-1]), min(single), max(single), lambdas[-1], at_fixed))
    table = Table(
        f"Base beside parts of a datastore of {corpus}; without it {perplexity(-lm):.2f}",
        ("entries", "perplexity", "least of the orders", "most", "lambda", "perplexity at lambda .25"),
        tuple(rows),
    )
    sizes = [float(row[0]) for row in rows]
    charts = (
        Chart("size", f"Perplexity against the size of the datastore, {corpus}", "entries", "perplexity",
              (line("with retrieval", sizes, losses, documents),), log_x=True),
        Chart("lambda", "Best lambda against the size of the datastore", "entries", "lambda",
              (Line("fitted", tuple(sizes), tuple(lambdas)),), log_x=True),
    )  # fmt: skip
    verdicts = (
        falls("perplexity falls with the size of the datastore", losses, documents),
        lower("the last doubling still helps", losses[-1], losses[-2], documents),
        further_right(
            "the best lambda grows with the datastore, largest beside smallest",
            curves[-1],
            curves[0],
            documents,
            LAMBDAS,
        ),
    )
    return Findings((table,), verdicts, charts, (f"The paper's best lambdas: {PAPER_LAMBDAS}.",))


EXPERIMENT = Experiment("Size of the datastore", f"{KNN_LM}, Figures 2a and 2b", __doc__, needs, run)
