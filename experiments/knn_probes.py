"""How much of the index a search visits: recall and perplexity by the number of lists.

The paper visits 32 of 4,096 lists, with codes of 64 bytes, and says nothing of other numbers. Here: with more lists
more of the true neighbors are found, and perplexity must fall; it need not, since a search that misses neighbors also
smooths (2305.14625). Distances are exact in every row.
"""

from experiments.approximate import found, lists, recall
from experiments.curves import line, perplexity
from experiments.experiment import KNN_LM, Experiment, Need
from experiments.knn_precision import refitted
from experiments.lab import BASE, Lab, Sight
from experiments.records import Chart, Findings, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import falls, lower
from knnlm.evaluation.splits import Part
from knnlm.options import SearchOptions

PROBES = (1, 2, 4, 8, 16, 32)


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    """The base on the main corpus."""
    return [Sight(BASE, texts.main.name)]


def run(lab: Lab) -> Findings:
    """A row per number of lists."""
    sight = Sight(BASE, lab.texts.main.name)
    view = lab.view(sight)
    there = lists(lab.stored_tokens(sight.corpus))
    rows, losses = [], []
    probes = [p for p in PROBES if p <= there]
    for probe in probes:
        options = SearchOptions(k=lab.scale.k, nprobe=probe, rescore=True, overfetch=4.0)
        tune, report = (found(lab, sight, part, options) for part in (Part.TUNE, Part.REPORT))
        _, lmbda, loss = refitted(view, tune, report)
        losses.append(loss)
        rows.append((f"{probe} of {there}", recall(report, view.report.neighbors), perplexity(loss), lmbda))
    rows.append(("exact search", 1.0, perplexity(-view.mixed), view.lmbda))
    documents = view.report.documents
    chart = Chart(
        "probes", f"Perplexity against the lists that are visited, {sight.corpus}", "lists visited", "perplexity",
        (line("with retrieval", probes, losses, documents),), log_x=True,
    )  # fmt: skip
    verdicts = (
        falls("perplexity falls with the lists that are visited", losses, documents),
        lower("exact search is better than the most lists", -view.mixed, losses[-1], documents),
    )
    columns = ("lists visited", f"recall of the {lab.scale.k} nearest", "perplexity", "lambda")
    return Findings((Table("Recall and perplexity", columns, tuple(rows)),), verdicts, (chart,))


EXPERIMENT = Experiment("Lists that are visited", f"{KNN_LM}, section 4.1", __doc__, needs, run)
