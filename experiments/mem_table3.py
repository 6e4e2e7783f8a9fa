"""One memory for many models: beside every base with its tokenizer.

The paper (Tables 3 and 4): one memory of 0.5B parameters, mixed with Qwen2 and Qwen2.5 of 0.5B to 72B, lowers mean
perplexity on three domains from 14.9 ... 5.9 to 4.1 ... 3.5: it helps every base, and how large that is almost stops
mattering.

Here: one memory, trained beside the base, mixed with models of other sizes and other text. It must help each, and the
spread of their log-perplexities must shrink.
"""

import numpy as np

from experiments.experiment import MEMORY_DECODER, Experiment, Need
from experiments.lab import BASE, Lab, Learner
from experiments.memories import Memory, beside
from experiments.records import Chart, Findings, Line, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import Verdict, lower
from knnlm.evaluation.splits import Part

PAPER = (  # mean over three domains: base, with the memory
    ("Qwen2-0.5B", 14.88, 4.05), ("Qwen2-1.5B", 10.36, 3.87), ("Qwen2-7B", 7.53, 3.66), ("Qwen2-72B", 5.87, 3.45),
)  # fmt: skip


def bases(texts: Texts) -> dict[str, Learner]:
    """Models of one tokenizer, none of which has read the corpus that is learnt."""
    other = texts.all[-1].name
    return {
        "the base": BASE, f"the base after {other}": Learner(other),
        f"4 layers of 256 from scratch, {other}": Learner(other, layers=4, width=256),
        f"2 layers of 128 from scratch, {other}": Learner(other, layers=2, width=128),
    }  # fmt: skip


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    return [*bases(texts).values(), Memory(texts.main.name)]


def run(lab: Lab) -> Findings:
    """Perplexity of each base alone and with the one memory."""
    corpus = lab.texts.main.name
    memory = Memory(corpus)
    rows: list[tuple[str | float | None, ...]] = [
        (f"paper: {name}", None, lm, found, float(np.log(lm / found))) for name, lm, found in PAPER
    ]
    verdicts: list[Verdict] = []
    losses = []
    documents = lab.held(BASE, corpus, Part.REPORT).document_of
    assert documents is not None
    for name, base in bases(lab.texts).items():
        lm = lab.held(base, corpus, Part.REPORT).lm_log_probs.astype(np.float64)
        found = beside(lab, memory, base)
        losses.append((-lm, -found.mixed))
        perplexities = [float(np.exp(-x.mean())) for x in (lm, found.mixed)]
        rows.append((name, found.weight, *perplexities, float((found.mixed - lm).mean())))
        verdicts.append(lower(f"the memory helps {name}", -found.mixed, -lm, documents))
    alone, helped = (np.stack(part) for part in zip(*losses, strict=True))
    worst, best = int(np.argmax(alone.mean(axis=1))), int(np.argmin(alone.mean(axis=1)))
    apart, closer = (part[worst] - part[best] for part in (alone, helped))
    verdicts.append(lower("the worst and the best base come closer", closer, apart, documents))
    table = Table(
        f"One memory of {corpus} beside models of one tokenizer",
        ("base", "weight", "LM", "LM + memory", "gain, nats per token"), tuple(rows),
    )  # fmt: skip
    places = tuple(float(i) for i in range(len(alone)))
    lines = tuple(
        Line(label, places, tuple(float(np.exp(x)) for x in part.mean(axis=1)))
        for label, part in (("LM", alone), ("LM + memory", helped))
    )
    chart = Chart("bases", "One memory, several bases", "base", "perplexity", lines, bars=True)
    return Findings((table,), tuple(verdicts), (chart,))


EXPERIMENT = Experiment("One memory, several bases", f"{MEMORY_DECODER}, Tables 3 and 4", __doc__, needs, run)
