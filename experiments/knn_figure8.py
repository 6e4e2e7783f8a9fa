"""Can a model that knows the text by heart stand in for the datastore?

The paper: trained without dropout until its loss on the training text is zero, the model has 28.59 on new text (17.96
with dropout), and mixed with the good model it gives .1, the datastore 1.9.

Here: the base is trained on a part of the documents again and again (no model here has dropout), and mixed with the
base with a fitted weight; beside it a datastore of the same part. The datastore must give more. The base has not read
this domain, so what was learnt by heart is also what any training gives: this is a harder control than the paper's.
"""

import json

import numpy as np

from experiments.curves import perplexity
from experiments.experiment import KNN_LM, Experiment, Need
from experiments.lab import BASE, Lab, Learner, Sight, mixed
from experiments.models import LOG
from experiments.records import Chart, Findings, Line, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import lower
from knnlm.evaluation.splits import Part
from knnlm.rules import best_lambda


def memorising(corpus: str, scale: Scale) -> Learner:
    """The base, trained on a part of the documents for many epochs."""
    return Learner(corpus, epochs=scale.memorising_epochs, share=scale.memorised_share)


def needs(texts: Texts, scale: Scale) -> list[Need]:
    """The memorising model, and the base beside a datastore of the same part."""
    name = texts.main.name
    return [memorising(name, scale), Sight(BASE, name, share=scale.memorised_share)]


def run(lab: Lab) -> Findings:
    """Four rows and the loss on the training text."""
    corpus, scale = lab.texts.main.name, lab.scale
    learner = memorising(corpus, scale)
    view = lab.view(Sight(BASE, corpus, share=scale.memorised_share))
    tune, report = (
        lab.held(learner, corpus, part).lm_log_probs.astype(np.float64) for part in (Part.TUNE, Part.REPORT)
    )
    weight = best_lambda(view.tune.lm, tune)
    beside = -mixed(view.report.lm, report, weight)
    log = json.loads((lab.weights(learner) / LOG).read_text())
    per_epoch = max(1, round(log["steps"] / log["epochs"]))
    losses = log["losses"]
    means = [float(np.mean(losses[i : i + per_epoch])) for i in range(0, len(losses), per_epoch)]
    rows = (
        ("base", 17.96, perplexity(-view.report.lm), None),
        ("memorising model alone", 28.59, perplexity(-report), None),
        ("base + memorising model", 17.86, perplexity(beside), weight),
        ("base + datastore of the same text", 16.06, perplexity(-view.mixed), view.lmbda),
    )
    chart = Chart(
        "training", f"Loss on the memorised part of {corpus}", "epoch", "nats per token",
        (Line("training", tuple(float(i + 1) for i in range(len(means))), tuple(means)),),
    )  # fmt: skip
    documents = view.report.documents
    verdicts = (
        lower("the datastore gives more than the memorising model", -view.mixed, beside, documents),
        lower("on new text the memorising model is worse than the base", -view.report.lm, -report, documents),
    )
    note = f"Perplexity on the memorised text in the last epoch: {np.exp(means[-1]):.2f}."
    columns = ("model", "paper (dev)", "perplexity", "weight")
    return Findings((Table("On documents that neither has seen", columns, rows),), verdicts, (chart,), (note,))


EXPERIMENT = Experiment("A model that knows the text by heart", f"{KNN_LM}, Figure 8", __doc__, needs, run)
