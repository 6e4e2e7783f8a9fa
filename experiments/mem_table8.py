"""The size of a memory.

The paper (Table 8, WikiText-103): memories of 124M, 345M and 774M parameters bring GPT-2 small to 13.36, 12.08 and
11.67, GPT-2 XL to 10.93, 10.43 and 10.28: larger is better beside every base.

Here: memories of three sizes from scratch, the same steps, beside the base, and the one that starts as the base for
comparison. The mixture must fall with size.
"""

import numpy as np

from experiments.experiment import MEMORY_DECODER, Experiment, Need
from experiments.lab import BASE, Lab, Sight
from experiments.memories import Memory, beside, folder, share
from experiments.records import Chart, Findings, Line, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import falls, interval
from knnlm.memory.manifest import MemoryManifest

PAPER = (("124M", 124e6, 13.36), ("345M", 345e6, 12.08), ("774M", 774e6, 11.67))
SIZES = ((1, 64), (2, 128), (4, 256))


def memories(corpus: str) -> list[Memory]:
    return [*(Memory(corpus, layers=layers, width=width) for layers, width in SIZES), Memory(corpus)]


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    return [Sight(BASE, texts.main.name), *memories(texts.main.name)]


def run(lab: Lab) -> Findings:
    """Perplexity of the base with memories of each size."""
    corpus = lab.texts.main.name
    view = lab.view(Sight(BASE, corpus))
    lm, documents = view.report.lm, view.report.documents
    rows: list[tuple[str | float | None, ...]] = [
        (f"paper: GPT-2 small with {name}", parameters, None, found, None) for name, parameters, found in PAPER
    ]
    losses, sizes = [], []
    for memory in memories(corpus):
        found = beside(lab, memory)
        parameters = MemoryManifest.open(folder(lab, memory)).parameters
        name = f"{memory.layers} layers of {memory.width}" if memory.layers else "starts as the base"
        recovered = share(lm, view.mixed, found.mixed)
        rows.append((name, parameters, found.weight, float(np.exp(-found.mixed.mean())), recovered))
        if memory.layers:
            losses.append(-found.mixed)
            sizes.append(float(parameters))
    band = [interval(loss, documents) for loss in losses]
    line = Line("LM + memory", tuple(sizes), *(tuple(float(np.exp(b[i])) for b in band) for i in range(3)))
    return Findings(
        (Table(f"Memories by size, {corpus}", ("", "parameters", "weight", "perplexity", "R"), tuple(rows)),),
        (falls("perplexity falls with the size of the memory", losses, documents),),
        (Chart("size", f"Size of the memory, {corpus}", "parameters", "perplexity", (line,), log_x=True),),
    )


EXPERIMENT = Experiment("The size of a memory", f"{MEMORY_DECODER}, Table 8", __doc__, needs, run)
