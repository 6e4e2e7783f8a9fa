"""What it costs to read: the base alone, with a memory, with retrieval.

The paper (Figure 4; Qwen2.5-1.5B with a memory of a third of its size): 1.28 times the time of the base,
retrieval-augmented prompts 1.51, kNN-LM 2.17.

Here: scoring the same held-out text in one process, in turn. The memory is as large as the base, so about twice the
time is what it must cost; a net that reads keys costs less; retrieval costs what the index takes. Times, unlike all
else, are not the same in each run.
"""

import numpy as np

from experiments.experiment import MEMORY_DECODER, Experiment, Need
from experiments.lab import BASE, Lab, Sight
from experiments.memories import Memory, folder
from experiments.records import Chart, Findings, Line, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import Verdict, by_interval
from knnlm.evaluation.collect import observe
from knnlm.evaluation.splits import Part
from knnlm.evaluation.timing import interleave
from knnlm.index.searcher import Searcher
from knnlm.lm.model import LanguageModel
from knnlm.memory.served import open_mlp
from knnlm.messages import SearchRequest
from knnlm.neighbors import target_log_probs
from knnlm.options import SearchOptions

PAPER = (("LM", 1.0), ("LM + memory", 1.28), ("LM + kNN", 2.17))
ROUNDS = 7
MIN_SECONDS = 0.3  # of a round
DOCUMENTS = 3


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    return [Sight(BASE, texts.main.name), *memories(texts.main.name)]


def memories(corpus: str) -> tuple[Memory, Memory]:
    return Memory(corpus), Memory(corpus, mlp=True)


def run(lab: Lab) -> Findings:
    """Time per token of each way, over that of the base."""
    corpus, scale = lab.texts.main.name, lab.scale
    lab.view(Sight(BASE, corpus))
    few = lab.documents(corpus, Part.REPORT)[:DOCUMENTS]
    lm = lab.model(BASE)
    decoder, net = memories(corpus)
    memory, mlp = LanguageModel.load(str(folder(lab, decoder)), prefix_cache_bytes=0), open_mlp(folder(lab, net)).net
    searcher = Searcher.open(lab.store(BASE, corpus))
    options = SearchOptions(k=min(scale.k, searcher.manifest.live_entries), rescore=True)

    def timed(beside: str) -> int:
        held = observe(lm, few, context_length=scale.context, min_context=scale.min_context)
        if beside == "LM + memory":
            observe(memory, few, context_length=scale.context, min_context=scale.min_context)
        elif beside == "LM + mlp memory":
            mlp.target_log_probs(held.queries, held.targets)
        elif beside == "LM + kNN":
            request = SearchRequest(searcher.manifest.domain, held.queries, options)
            target_log_probs(searcher.search(request).neighbors, held.targets, 1.0)
        return len(held.targets)

    names = ("LM", "LM + memory", "LM + mlp memory", "LM + kNN")
    rates = interleave({name: lambda name=name: timed(name) for name in names}, MIN_SECONDS, ROUNDS)  # type: ignore[misc]
    searcher.close()
    rows: list[tuple[str | float | None, ...]] = [(f"paper: {name}", None, ratio) for name, ratio in PAPER]
    rows += [(name, rates[name].median, rates["LM"].over(rates[name])) for name in names]
    verdicts = tuple(
        _less(claim, rates[first].rounds, rates[second].rounds)
        for claim, first, second in (
            ("the memory costs time", "LM", "LM + memory"),
            ("the net that reads keys costs less than the memory", "LM + mlp memory", "LM + memory"),
            ("the memory costs less than retrieval", "LM + memory", "LM + kNN"),
        )
    )
    line = Line("time per token", (0.0, 1.0, 2.0, 3.0), tuple(rates["LM"].over(rates[name]) for name in names))
    return Findings(
        (Table("Time per token of scoring", ("", "tokens/s", "over the LM"), tuple(rows)),), verdicts,
        (Chart("latency", "Time per token over the LM: " + ", ".join(names), "method", "ratio", (line,), bars=True),),
        (f"Exact search among {scale.store_tokens:,} entries at most; the memory is as large as the base.",),
    )  # fmt: skip


def _less(claim: str, first: tuple[float, ...], second: tuple[float, ...]) -> Verdict:
    """The first takes less time than the second, both tokens/s by round."""
    ratios = np.log(np.array(second) / np.array(first))
    low, high = float(ratios.min()), float(ratios.max())
    test = f"log ratio of times, least and largest of {len(ratios)} rounds in turn"
    return Verdict(claim, by_interval(low, high), float(np.median(ratios)), low, high, "log ratio", test)


EXPERIMENT = Experiment(
    "Latency of memories", f"{MEMORY_DECODER}, Figure 4", __doc__, needs, run, lambda _: 4 * ROUNDS * MIN_SECONDS
)
