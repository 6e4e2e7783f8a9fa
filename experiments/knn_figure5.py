"""The weight of retrieval: perplexity against lambda, for a model of the domain and one of another.

The paper: both curves have a lowest point between their ends; in the model's own domain at .25 to .40, out of it at
about .65 (24.85 on books with the model of Wikipedia).

Here: both curves must have that shape, and the model that has not read the domain must want a larger lambda than the
one that was trained on it, of the same documents.
"""

from experiments.curves import LAMBDAS, line, over_lambda, perplexity
from experiments.experiment import KNN_LM, Experiment, Need
from experiments.lab import BASE, Lab, Learner, Sight
from experiments.records import Chart, Findings, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import Verdict, further_right, optimum, valley


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    """The base and the trained model on every domain."""
    return [Sight(learner, c.name) for c in texts.domains for learner in (BASE, Learner(c.name))]


def run(lab: Lab) -> Findings:
    """The curves, and where they are lowest."""
    rows: list[tuple[str | float | None, ...]] = [
        ("paper: Wikipedia, in domain", None, 0.25, None, None),
        ("paper: books, model of Wikipedia", 24.85, 0.65, None, None),
    ]
    verdicts: list[Verdict] = []
    charts = []
    for corpus in lab.texts.domains:
        lines, found = [], {}
        for learner, who in ((BASE, "base"), (Learner(corpus.name), "trained on it")):
            view = lab.view(Sight(learner, corpus.name))
            documents = view.report.documents
            losses = over_lambda(view.report.lm, view.knn)
            found[who] = losses
            best, low, high = optimum(losses, documents, LAMBDAS)
            name = f"{corpus.name}, {who}"
            rows.append((name, perplexity(losses[LAMBDAS.index(best)]), best, low, high))
            lines.append(line(who, LAMBDAS[:-1], list(losses[:-1]), documents))
            verdicts.append(valley(f"a lowest point between the ends: {name}", losses, documents, LAMBDAS))
        verdicts.append(
            further_right(
                f"out of domain the best lambda is larger: {corpus.name}", found["base"], found["trained on it"],
                documents, LAMBDAS,
            )
        )  # fmt: skip
        charts.append(
            Chart(
                corpus.name.replace(" ", "-"),
                f"Perplexity against lambda, {corpus.name}",
                "lambda",
                "perplexity",
                tuple(lines),
            )
        )
    table = Table("Where the curve is lowest", ("model and corpus", "perplexity", "lambda", "from", "to"), tuple(rows))
    return Findings((table,), tuple(verdicts), tuple(charts))


EXPERIMENT = Experiment("Weight of retrieval", f"{KNN_LM}, Figure 5", __doc__, needs, run)
