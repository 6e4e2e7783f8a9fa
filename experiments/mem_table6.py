"""What a memory knows: the probability of names, numbers and function words.

The paper (Table 6, a few tokens): for names and years the memory is far above the base, and above retrieval ("Jacobi"
68.94 against 0.12 %, "1906" 98.65 against 1.57 %); for function words it stays near the base ("on" 40.11 against 45.51
%), where p_kNN lies far below (8.07 %). The table does not say whether these are the components or mixtures.

Here: all reported tokens in classes, the mean log-probability of each component alone. The memory must be above the
base for names and numbers, and lose less for function words than retrieval does.
"""

import numpy as np

from benchmarks.token_classes import CLASSES, classes
from experiments.experiment import MEMORY_DECODER, Experiment, Need
from experiments.lab import BASE, Lab, Sight
from experiments.memories import Memory, beside
from experiments.records import Findings, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import Verdict, lower
from knnlm.evaluation.splits import Part

MIN_TOKENS = 20  # of a class, for a verdict


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    return [Sight(BASE, texts.main.name), Memory(texts.main.name)]


def run(lab: Lab) -> Findings:
    """Mean log-probabilities by class of token."""
    corpus = lab.texts.main.name
    view = lab.view(Sight(BASE, corpus))
    found = beside(lab, Memory(corpus))
    kinds = classes(lab.model(BASE).tokenizer, lab.documents(corpus, Part.REPORT))
    lm, knn, documents = view.report.lm, view.knn, view.report.documents
    stored = np.isfinite(knn)
    rows: list[tuple[str | float | None, ...]] = []
    verdicts: list[Verdict] = []
    for kind in CLASSES:
        own = kinds == kind
        if not own.any():
            continue
        there = own & stored
        parts = (lm[own], found.report[own], knn[there], view.mixed[own], found.mixed[own])
        means = [float(x.mean()) if len(x) else None for x in parts]
        likelier = float((found.mixed > lm)[own].mean())
        rows.append((kind, int(own.sum()), *means, float(stored[own].mean()), likelier))
        if own.sum() < MIN_TOKENS:
            continue
        verdicts.append(lower(f"{kind}: with the memory likelier", -found.mixed[own], -lm[own], documents[own]))
        if kind in ("names", "numbers"):
            claim = f"{kind}: the memory alone is above the base"
            verdicts.append(lower(claim, -found.report[own], -lm[own], documents[own]))
        if kind == "function words" and there.any():
            claim = f"{kind}: the memory alone is above p_kNN, where that has the token at all"
            verdicts.append(lower(claim, -found.report[there], -knn[there], documents[there]))
    table = Table(
        f"Mean log-probability of the tokens that came, {corpus}",
        ("class", "tokens", "LM", "memory", "kNN where it has the token", "LM + kNN", "LM + memory",
         "share that kNN has", "share likelier with the memory"),
        tuple(rows),
    )  # fmt: skip
    return Findings((table,), tuple(verdicts))


EXPERIMENT = Experiment("Classes of tokens", f"{MEMORY_DECODER}, Table 6", __doc__, needs, run)
