"""A memory in place of the datastore: methods by base models.

The paper (WikiText-103, bases GPT-2 small to XL that have not read it): kNN-LM, the base trained further (DAPT), and a
memory of 124M parameters that starts from a model fine-tuned on WikiText-103. The memory is better than retrieval at
every size, and better than DAPT beside the two smaller bases only. The share of retrieval's gain in log-perplexity that
it recovers, R, is 1.34, 1.16, 1.22 and 1.14; but lambda of retrieval is fixed there, the memory's weight is tuned.

Here: the base as it is, and a small model that another corpus made from scratch. All weights are fitted on the same
held-out documents. Memory, control (the same, learning from the text alone) and DAPT see the same tokens as often. The
memory must recover a share of retrieval's gain, more than the control does. LoRA is left out.
"""

import numpy as np

from experiments.experiment import MEMORY_DECODER, Experiment, Need
from experiments.lab import BASE, Lab, Learner, Sight, mixed
from experiments.memories import Memory, beside
from experiments.records import Findings, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import Verdict, lower, ratio
from knnlm.evaluation.splits import Part
from knnlm.weights import fit_weights

PAPER = (  # LM, kNN, DAPT, memory
    ("GPT-2 small", 24.89, 15.62, 15.74, 13.36), ("GPT-2 medium", 18.29, 12.95, 12.78, 12.25),
    ("GPT-2 large", 15.80, 12.21, 11.10, 11.53), ("GPT-2 XL", 14.39, 11.30, 10.16, 10.93),
)  # fmt: skip


def weak(texts: Texts) -> Learner:
    """A small model of another corpus than the one that is stored."""
    return Learner(texts.all[-1].name, layers=2, width=128)


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    """Both bases beside datastores of their own, and the base trained further."""
    corpus = texts.main.name
    return [Sight(BASE, corpus), Learner(corpus), weak(texts), Sight(weak(texts), corpus), *memories(corpus)]


def memories(corpus: str) -> tuple[Memory, Memory, Memory]:
    """The memory, its control, and the net that reads keys."""
    return Memory(corpus), Memory(corpus, beta=0.0), Memory(corpus, mlp=True)


def run(lab: Lab) -> Findings:
    """Perplexities by method and base."""
    corpus = lab.texts.main.name
    memory, control, net = memories(corpus)
    rows: list[tuple[str | float | None, ...]] = [
        (
            f"paper: {name}, {method}",
            None,
            found,
            float(np.log(lm / found) / np.log(lm / knn)) if found != lm else None,
            None,
            None,
        )
        for name, lm, knn, dapt, learnt in PAPER
        for method, found in (("LM", lm), ("LM + kNN", knn), ("DAPT", dapt), ("LM + memory", learnt))
    ]
    verdicts: list[Verdict] = []
    for name, base in (("the base", BASE), ("the small model", weak(lab.texts))):
        view = lab.view(Sight(base, corpus))
        documents, lm = view.report.documents, view.report.lm
        learnt, text = beside(lab, memory, base), beside(lab, control, base)
        knn_tune = view.tune.knn(view.temperature)
        (knn_weight, weight), _ = fit_weights(
            view.tune.lm, [knn_tune, learnt.tune], [np.ones(len(knn_tune), np.bool_)] * 2
        )
        both = mixed(mixed(lm, view.knn, knn_weight / max(1 - weight, 1e-12)), learnt.report, weight)
        found = {"LM": (None, lm), "LM + kNN": (view.lmbda, view.mixed)}
        if base == BASE:
            further = lab.held(Learner(corpus), corpus, Part.REPORT)
            found["DAPT"] = (None, further.lm_log_probs.astype(np.float64))
            keys = beside(lab, net)
            found["LM + mlp memory"] = (keys.weight, keys.mixed)
        found |= {
            "LM + memory": (learnt.weight, learnt.mixed), "LM + control": (text.weight, text.mixed),
            "LM + kNN + memory": (knn_weight + weight, both),
        }  # fmt: skip
        rows += [
            (
                f"{name}, {method}",
                w,
                float(np.exp(-x.mean())),
                *((None,) * 3 if method == "LM" else ratio(x - lm, view.mixed - lm, documents)),
            )
            for method, (w, x) in found.items()
        ]
        claims = [
            ("retrieval helps", "LM + kNN", "LM"), ("the memory helps", "LM + memory", "LM"),
            ("the memory is better than retrieval", "LM + memory", "LM + kNN"),
            ("the memory is better than its control", "LM + memory", "LM + control"),
            ("both together are better than retrieval", "LM + kNN + memory", "LM + kNN"),
        ]  # fmt: skip
        claims += [("the memory is better than DAPT", "LM + memory", "DAPT")] if base == BASE else []
        verdicts += [lower(f"{c}, beside {name}", -found[a][1], -found[b][1], documents) for c, a, b in claims]
    table = Table(
        f"Methods on {corpus}: R is the share of retrieval's gain in log-perplexity that is recovered",
        ("", "weight", "perplexity", "R", "from", "to"), tuple(rows),
    )  # fmt: skip
    return Findings((table,), tuple(verdicts), notes=("LoRA is left out.",))


EXPERIMENT = Experiment("Memories by method and base", f"{MEMORY_DECODER}, Table 1", __doc__, needs, run)
