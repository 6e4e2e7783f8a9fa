"""Less training, more datastore: a model of a small part of the text beside a datastore of all of it.

The paper: a model of 100 million tokens has 19.59, a model of all 3 billion 15.17, and the small one's beside a
datastore of 3 billion 13.73: a datastore is worth more than training on the same text.

Here: the base trained on an eighth of the stored documents, beside a datastore of all, against the base trained on
all, each for equal epochs. That the datastore helps must hold; whether it crosses the trained model is said as it is:
keys of a model of four million parameters are weak, and so is what it learns from little text.
"""

from experiments.curves import perplexity
from experiments.experiment import KNN_LM, Experiment, Need
from experiments.lab import Lab, Learner, Sight
from experiments.records import Findings, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import lower

SHARE = 0.125


def few(corpus: str) -> Sight:
    """The model of a part, beside a datastore of all."""
    return Sight(Learner(corpus, share=SHARE), corpus)


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    """The model of a part, and the model of all."""
    return [few(texts.main.name), Sight(Learner(texts.main.name), texts.main.name)]


def run(lab: Lab) -> Findings:
    """Four rows."""
    corpus = lab.texts.main.name
    part, whole = lab.view(few(corpus)), lab.view(Sight(Learner(corpus), corpus))
    rows = (
        ("trained on a part", 19.59, perplexity(-part.report.lm), None),
        ("trained on a part, datastore of all", 13.73, perplexity(-part.mixed), part.lmbda),
        ("trained on all", 15.17, perplexity(-whole.report.lm), None),
        ("trained on all, datastore of all", None, perplexity(-whole.mixed), whole.lmbda),
    )
    documents = part.report.documents
    verdicts = (
        lower("the datastore helps the model of a part", -part.mixed, -part.report.lm, documents),
        lower(
            "the model of a part with the datastore is better than the model of all",
            -part.mixed,
            -whole.report.lm,
            documents,
        ),
    )
    columns = (f"model of {corpus}", "paper (test)", "perplexity", "lambda")
    return Findings(
        (Table("A part is one eighth of the documents; the paper's, a thirtieth", columns, rows),), verdicts
    )


EXPERIMENT = Experiment("Less training, more datastore", f"{KNN_LM}, Table 3", __doc__, needs, run)
