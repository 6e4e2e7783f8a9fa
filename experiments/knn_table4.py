"""Domain adaptation without training: a language model beside a datastore of a domain that it has not seen.

The paper: a model of Wikipedia has perplexity 34.84 on books, 20.47 with a datastore of books (lambda about .65), and a
model of books 11.89: retrieval closes about half of the gap in log-perplexity (its text says 23 points, its table
14.4; that 20.47 is close to 11.89 cannot be said).

Here: the base, which has read about Python, beside a datastore of each domain. On every domain it must be clearly
better with the datastore than without. Whether the base trained on the same text is better still is said too; the paper
trains that model from scratch on 700 million words, we train the base further on what is stored.
"""

import numpy as np

from experiments.experiment import KNN_LM, Experiment, Need
from experiments.lab import BASE, Lab, Learner, Sight
from experiments.records import Chart, Findings, Line, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import Verdict, interval, lower

PAPER = (("Wiki-3B on books", 34.84, 20.47, 11.89, 0.65),)


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    """The base and the trained model, each beside a datastore of its own keys of every corpus."""
    return [Sight(learner, c.name) for c in texts.all for learner in (BASE, Learner(c.name))]


def run(lab: Lab) -> Findings:
    """Perplexities on each corpus."""
    rows: list[tuple[str | float | None, ...]] = [
        (f"paper: {name}", lm, knn, trained, None, lmbda, None, float(np.log(lm / knn) / np.log(lm / trained)))
        for name, lm, knn, trained, lmbda in PAPER
    ]
    verdicts: list[Verdict] = []
    names, bars = [], []
    for corpus in lab.texts.all:
        base = lab.view(Sight(BASE, corpus.name))
        trained = lab.view(Sight(Learner(corpus.name), corpus.name))
        documents = base.report.documents
        losses = [-base.report.lm, -base.mixed, -trained.report.lm, -trained.mixed]
        gap = (losses[0] - losses[2]).mean()
        closed = float((losses[0] - losses[1]).mean() / gap) if gap > 0 else None
        rows.append((corpus.name, *(float(np.exp(x.mean())) for x in losses), base.lmbda, trained.lmbda, closed))
        claims = (
            ("the base is better with a datastore of the domain", 1, 0),
            ("the base trained on the domain is better than the base with its datastore", 2, 1),
            ("retrieval still helps the trained model", 3, 2),
        )
        for claim, first, second in claims:
            verdicts.append(lower(f"{claim}, on {corpus.name}", losses[first], losses[second], documents))
        names.append(corpus.name)
        bars.append([interval(x, documents) for x in losses[:3]])
    table = Table(
        "Perplexity per token on documents that nothing was fitted to",
        ("corpus", "LM", "LM + datastore", "trained LM", "trained LM + datastore", "lambda", "lambda, trained",
         "share of the gap in log-perplexity that the datastore closes"),
        tuple(rows),
    )  # fmt: skip
    places = tuple(float(i) for i in range(len(names)))
    lines = tuple(
        Line(
            label, places, *(tuple(float(np.exp(bar[i][part])) for bar in bars) for part in (0, 1, 2)),
        )
        for i, label in enumerate(("LM", "LM + datastore", "trained LM"))
    )  # fmt: skip
    chart = Chart("domains", "Domain adaptation: " + ", ".join(names), "corpus", "perplexity", lines, bars=True)
    return Findings((table,), tuple(verdicts), (chart,))


EXPERIMENT = Experiment("Domain adaptation", f"{KNN_LM}, Table 4", __doc__, needs, run)
