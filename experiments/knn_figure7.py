"""The control: does an n-gram model of the same text give what the datastore gives?

The paper: a model of n-grams of the training text, mixed in, gives .2 at best (orders 4 to 6), the datastore 1.9: it
is the representation that matters, not the memory of phrases.

Here: an interpolated Kneser-Ney model of exactly what is stored, mixed with a fitted weight, must give much less than
the datastore. With a small model and little text it may give as much or more; then that is what this page says.
"""

import numpy as np

from experiments.curves import line, perplexity
from experiments.experiment import KNN_LM, Experiment, Need
from experiments.kneser_ney import KneserNey
from experiments.lab import BASE, Floats, Lab, Learner, Sight, View, mixed
from experiments.records import Chart, Findings, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import Verdict, lower
from knnlm.evaluation.splits import Part, encode
from knnlm.rules import best_lambda
from knnlm.weights import fit_weights

ORDERS = (1, 2, 3, 4, 5, 6)


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    """The trained model, as in the paper, and the base, on every domain."""
    return [Sight(learner, c.name) for c in texts.domains for learner in (BASE, Learner(c.name))]


def run(lab: Lab) -> Findings:
    """A row per order and model."""
    rows: list[tuple[str | float | None, ...]] = [("paper: WikiText-103, dev", 17.96, 17.8, None, 16.06, None)]
    verdicts: list[Verdict] = []
    charts = []
    for corpus in lab.texts.domains:
        lm = lab.model(BASE)
        stored = [d.tokens for d in encode(lab.stored(corpus.name), lm.tokenizer)]
        held = {p: [d.tokens for d in lab.documents(corpus.name, p)] for p in (Part.TUNE, Part.REPORT)}
        grams: dict[int, dict[Part, Floats]] = {}
        for order in ORDERS:
            model = KneserNey(stored, order, lm.info.vocab_size)
            grams[order] = {p: np.concatenate([model.log_probs(d) for d in ds]) for p, ds in held.items()}
        for learner, who in ((Learner(corpus.name), "trained on it"), (BASE, "base")):
            view = lab.view(Sight(learner, corpus.name))
            documents, alone = view.report.documents, -view.report.lm
            losses = []
            for order in ORDERS:
                weight = best_lambda(view.tune.lm, grams[order][Part.TUNE])
                losses.append(-mixed(view.report.lm, grams[order][Part.REPORT], weight))
            best = int(np.argmin([x.mean() for x in losses]))
            both = _both(view, grams[ORDERS[best]])
            name = f"{corpus.name}, {who}"
            rows.append(
                (
                    name,
                    perplexity(alone),
                    perplexity(losses[best]),
                    ORDERS[best],
                    perplexity(-view.mixed),
                    perplexity(both),
                )
            )
            verdicts += [
                lower(f"the datastore gives more than n-grams, {name}", -view.mixed, losses[best], documents),
                lower(f"the datastore gives something on top of n-grams, {name}", both, losses[best], documents),
            ]
            if who != "base":
                flat = [-view.mixed] * len(ORDERS)
                lines = line("LM + n-grams", ORDERS, losses, documents), line("LM + datastore", ORDERS, flat, documents)
                title = f"n-grams beside the datastore, {corpus.name}"
                charts.append(Chart(corpus.name.replace(" ", "-"), title, "order of the n-grams", "perplexity", lines))
    table = Table(
        "Perplexity with an n-gram model of what is stored (the best order on the reported documents, in its favour)",
        ("corpus", "LM", "LM + n-grams", "best order", "LM + datastore", "LM + both"),
        tuple(rows),
    )
    return Findings((table,), tuple(verdicts), tuple(charts))


def _both(view: View, grams: dict[Part, Floats]) -> Floats:
    """Losses with both, the weights fitted together."""
    tune, report = view.tune, view.report
    everywhere = np.ones(len(tune.lm), np.bool_)
    weights, _ = fit_weights(
        tune.lm, [tune.knn(view.temperature), grams[Part.TUNE]], [tune.neighbors.present, everywhere]
    )
    rest = 1 - weights.sum()
    parts = np.stack([report.lm, view.knn, grams[Part.REPORT]])
    with np.errstate(divide="ignore"):
        losses: Floats = -np.logaddexp.reduce(parts + np.log([rest, *weights])[:, None], axis=0)
    return losses


EXPERIMENT = Experiment("The control: n-grams", f"{KNN_LM}, Figure 7", __doc__, needs, run)
