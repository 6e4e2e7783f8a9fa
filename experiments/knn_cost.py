"""What it costs: storing and searching, by the number of entries.

The paper: an index of 103 million entries takes two hours on one processor core, and 217,646 tokens of the
development set are searched and mixed in 25 minutes; keys take 400 GB in float32.

Here: bytes of an entry, and the time of exact search against an index like the paper's, at a quarter, half and all of
the entries. Exact search must take time in proportion to the entries: twice as many, 1.6 to 2.5 times the time. Times
are medians of rounds in turn; they are not the same twice, and no other number of this page depends on them.
"""

from collections.abc import Callable
from contextlib import closing
from itertools import pairwise

import numpy as np

from experiments.approximate import paper_index
from experiments.experiment import KNN_LM, Experiment, Need
from experiments.lab import BASE, Lab, Sight
from experiments.records import Findings, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import Outcome, Verdict
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore
from knnlm.evaluation.splits import Part
from knnlm.evaluation.timing import interleave
from knnlm.index.flat import Flat
from knnlm.index.searcher import Searcher
from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions

QUERIES, SECONDS, ROUNDS = 64, 0.2, 5
SHARES = (0.25, 0.5, 1.0)
LEAST, MOST = 1.6, 2.5


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    """The base on the main corpus."""
    return [Sight(BASE, texts.main.name)]


def run(lab: Lab) -> Findings:
    """Rates in turn, bytes from the files."""
    sight = Sight(BASE, lab.texts.main.name)
    lab.view(sight)
    path = lab.store(BASE, sight.corpus)
    recipe = paper_index(path)
    queries = np.asarray(lab.held(BASE, sight.corpus, Part.TUNE).queries[:QUERIES], np.float32)
    keys = Datastore.open(path).keys
    manifest = Manifest.load(path)
    sizes = [round(share * len(keys)) for share in SHARES]
    indexes = {size: Flat().opened(np.asarray(keys[:size])) for size in sizes}
    with closing(Searcher.open(path, index=recipe)) as searcher:
        request = SearchRequest(path.parent.name, queries, SearchOptions(k=lab.scale.k))

        def exact(size: int) -> Callable[[], int]:
            return lambda: len(indexes[size].search(queries, min(lab.scale.k, size))[0])

        programs = {f"exact search, {size:,} entries": exact(size) for size in sizes}
        programs[f"{recipe}, {sizes[-1]:,} entries"] = lambda: len(searcher.search(request).neighbors.values)
        rates = interleave(programs, SECONDS, ROUNDS)
    for index in indexes.values():
        index.close()
    names = list(programs)
    growth = [rates[a].over(rates[b]) for a, b in pairwise(names[: len(sizes)])]
    fits = all(LEAST <= ratio <= MOST for ratio in growth)
    verdict = Verdict(
        "exact search takes time in proportion to the entries", Outcome.HOLDS if fits else Outcome.FAILS,
        float(np.mean(growth)), min(growth), max(growth), "times for twice the entries",
        f"each doubling within {LEAST} and {MOST}; medians of {ROUNDS} rounds in turn",
    )  # fmt: skip
    speeds = Table("Searching", ("", "queries/s"), tuple((name, rates[name].median) for name in names))
    bytes_of = {name: file.bytes / manifest.entries for name, file in manifest.files.items()}
    stored = Table("Bytes of an entry", ("file", "bytes"), tuple((name, size) for name, size in bytes_of.items()))
    return Findings((speeds, stored), (verdict,))


EXPERIMENT = Experiment("What it costs", f"{KNN_LM}, section 4.1", __doc__, needs, run)
