"""What a memory learns from: retrieval, the text, or both; and whether it is more than a second model of the domain.

The paper: perplexity with memories trained on KL alone, CE alone and half of each is 3.93, 4.81 and 3.64 (Table 9,
biomedical, Qwen2.5-3B): both, then KL, then CE far behind. Mixing in a small model trained further on the text (Table
17) gives 15.95 beside GPT-2 small, the memory 13.36; but that model alone has 15.74, so its weight was not tuned over
the whole range.

Here: same start, same steps, same tokens; every weight is fitted from 0 to 0.99. CE alone is the control of Table 17.
"""

import numpy as np

from experiments.experiment import MEMORY_DECODER, Experiment, Need
from experiments.lab import BASE, Lab, Sight
from experiments.memories import Memory, beside, share
from experiments.records import Chart, Findings, Line, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import lower

PAPER = (("KL", 1.0, 3.93), ("KL and CE", 0.5, 3.64), ("CE", 0.0, 4.81))
NAMES = {1.0: "KL", 0.5: "KL and CE", 0.0: "CE (control)"}


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    return [Sight(BASE, texts.main.name), *memories(texts.main.name).values()]


def memories(corpus: str) -> dict[str, Memory]:
    return {name: Memory(corpus, beta=beta) for beta, name in NAMES.items()}


def run(lab: Lab) -> Findings:
    """Perplexity with a memory of each loss."""
    corpus = lab.texts.main.name
    view = lab.view(Sight(BASE, corpus))
    lm, documents = view.report.lm, view.report.documents
    rows: list[tuple[str | float | None, ...]] = [
        (f"paper: {name}", beta, None, None, found, None) for name, beta, found in PAPER
    ]
    losses = {}
    for name, memory in memories(corpus).items():
        found = beside(lab, memory)
        losses[name] = -found.mixed
        alone, both = (float(np.exp(-x.mean())) for x in (found.report, found.mixed))
        rows.append((name, memory.beta, found.weight, alone, both, share(lm, view.mixed, found.mixed)))
    verdicts = tuple(
        lower(f"{first} is better than {second}", losses[first], losses[second], documents)
        for first, second in (("KL and CE", "KL"), ("KL", "CE (control)"), ("KL and CE", "CE (control)"))
    )
    columns = ("", "beta", "weight", "memory alone", "LM + memory", "R")
    line = Line("LM + memory", (0.0, 0.5, 1.0), tuple(float(np.exp(losses[NAMES[b]].mean())) for b in (0.0, 0.5, 1.0)))
    return Findings(
        (Table(f"Losses of a memory, {corpus}", columns, tuple(rows)),), verdicts,
        (Chart("beta", f"What a memory learns from, {corpus}", "weight of KL", "perplexity", (line,)),),
    )  # fmt: skip


EXPERIMENT = Experiment("What a memory learns from", f"{MEMORY_DECODER}, Tables 9 and 17", __doc__, needs, run)
