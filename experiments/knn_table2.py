"""Another domain: does retrieval from its own training text help a model of the domain?

The paper (books): 11.89 to 10.89 on test, with the model's own training text as the datastore and nothing else.

Here: the model trained on each domain, beside a datastore of exactly that text; it must be better with it.
"""

from experiments.curves import perplexity
from experiments.experiment import KNN_LM, Experiment, Need
from experiments.lab import Lab, Learner, Sight
from experiments.records import Findings, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import lower


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    """The trained model on every corpus."""
    return [Sight(Learner(c.name), c.name) for c in texts.all]


def run(lab: Lab) -> Findings:
    """A row per domain."""
    rows: list[tuple[str | float | None, ...]] = [("paper: books, test", 11.89, 10.89, None)]
    verdicts = []
    for corpus in lab.texts.all:
        view = lab.view(Sight(Learner(corpus.name), corpus.name))
        rows.append((corpus.name, perplexity(-view.report.lm), perplexity(-view.mixed), view.lmbda))
        claim = f"its own training text as a datastore helps a model of {corpus.name}"
        verdicts.append(lower(claim, -view.mixed, -view.report.lm, view.report.documents))
    columns = ("model and corpus", "LM", "LM + its training text", "lambda")
    return Findings((Table("Perplexity", columns, tuple(rows)),), tuple(verdicts))


EXPERIMENT = Experiment("Another domain", f"{KNN_LM}, Table 2", __doc__, needs, run)
