"""Whose keys make the targets.

The paper (Table 19, WikiText-103): targets of GPT-2 small, medium and large give memories with which GPT-2 small has
14.01, 13.80 and 13.77: a larger teacher is better, a little.

Here: teachers are a small model of another corpus, the base, and the base after the corpus itself; every memory starts
as the base, and stands beside the base. A better teacher must not give a worse memory.
"""

import numpy as np

from experiments.experiment import MEMORY_DECODER, Experiment, Need
from experiments.lab import BASE, Lab, Learner, Sight
from experiments.mem_table1 import weak
from experiments.memories import Memory, beside, share
from experiments.records import Findings, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import falls

PAPER = (("GPT-2 small", 14.01), ("GPT-2 medium", 13.80), ("GPT-2 large", 13.77))


def teachers(texts: Texts) -> dict[str, Learner]:
    """From the worst model of the corpus to the best."""
    return {"small model of another corpus": weak(texts), "the base": BASE,
            "the base after the corpus": Learner(texts.main.name)}  # fmt: skip


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    corpus, models = texts.main.name, teachers(texts).values()
    return [*(Sight(teacher, corpus) for teacher in models), *(Memory(corpus, teacher=teacher) for teacher in models)]


def run(lab: Lab) -> Findings:
    """Perplexity of the base with a memory of each teacher."""
    corpus = lab.texts.main.name
    base = lab.view(Sight(BASE, corpus))
    rows: list[tuple[str | float | None, ...]] = [(f"paper: {name}", None, None, None, f, None) for name, f in PAPER]
    losses = []
    for name, teacher in teachers(lab.texts).items():
        view = lab.view(Sight(teacher, corpus))
        found = beside(lab, Memory(corpus, teacher=teacher))
        losses.append(-found.mixed)
        own = [float(np.exp(-x.mean())) for x in (view.report.lm, view.mixed)]
        recovered = share(base.report.lm, base.mixed, found.mixed)
        rows.append((name, *own, found.weight, float(np.exp(-found.mixed.mean())), recovered))
    columns = ("teacher", "teacher alone", "teacher + kNN", "weight", "base + its memory", "R")
    claim = "a better teacher gives a better memory"
    return Findings(
        (Table(f"Teachers of a memory, {corpus}", columns, tuple(rows)),),
        (falls(claim, losses, base.report.documents),),
    )


EXPERIMENT = Experiment("Teachers", f"{MEMORY_DECODER}, Table 19", __doc__, needs, run)
