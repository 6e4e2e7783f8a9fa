"""The weight of a memory.

The paper (Table 7, law, mean over Qwen models): perplexity over alpha from .40 to .80 is a flat valley, lowest at .60,
with 2.4 % between its best and worst; alpha of each base is tuned by hand.

Here: the whole range. The lowest perplexity must lie inside, and what is fitted on other documents must cost little.
"""

import numpy as np

from experiments.experiment import MEMORY_DECODER, Experiment, Need
from experiments.lab import BASE, Lab, mixed
from experiments.memories import Memory, beside
from experiments.records import Chart, Findings, Line, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import interval, optimum, valley
from knnlm.evaluation.splits import Part

PAPER = ((0.40, 4.21), (0.45, 4.17), (0.50, 4.14), (0.55, 4.119), (0.60, 4.110), (0.65, 4.112), (0.70, 4.126),
         (0.75, 4.155), (0.80, 4.201))  # fmt: skip
WEIGHTS = tuple(round(0.05 * i, 2) for i in range(21))


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    return [BASE, Memory(texts.main.name)]


def run(lab: Lab) -> Findings:
    """Perplexity at each weight."""
    corpus = lab.texts.main.name
    held = lab.held(BASE, corpus, Part.REPORT)
    documents = held.document_of
    assert documents is not None
    found = beside(lab, Memory(corpus))
    losses = np.stack([-mixed(held.lm_log_probs.astype(np.float64), found.report, w) for w in WEIGHTS])
    best, low, high = optimum(losses, documents, WEIGHTS)
    cost = float(np.exp(-found.mixed.mean() - losses.mean(axis=1).min()))
    rows: list[tuple[str | float | None, ...]] = [("paper: law", weight, found) for weight, found in PAPER]
    rows += [(corpus, w, float(np.exp(loss.mean()))) for w, loss in zip(WEIGHTS, losses, strict=True)]
    band = [interval(loss, documents) for loss in losses]
    line = Line("LM + memory", WEIGHTS, *(tuple(float(np.exp(b[i])) for b in band) for i in range(3)))
    notes = (
        f"Fitted on other documents: {found.weight:.2f}. Best on these: {best:.2f} [{low:.2f}, {high:.2f}]; the fitted "
        f"one costs a factor of {cost:.4f} in perplexity.",
    )
    return Findings(
        (Table("Perplexity by the weight of the memory", ("", "weight", "perplexity"), tuple(rows)),),
        (valley("neither model alone is best", losses, documents, WEIGHTS),),
        (Chart("weight", f"Weight of the memory, {corpus}", "weight", "perplexity", (line,)),), notes,
    )  # fmt: skip


EXPERIMENT = Experiment("The weight of a memory", f"{MEMORY_DECODER}, Table 7", __doc__, needs, run)
