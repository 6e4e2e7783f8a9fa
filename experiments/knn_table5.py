"""What the key is: which tensor of the last layer stands for a context.

The paper (dev, k 1024): none 17.96; output 17.07; output behind its norm 17.01; what enters the feed-forward block,
behind the norm 16.06, before it 17.06; what enters attention, behind the norm 16.76, before it 17.14.

Here: all six of the last layer, temperature and lambda fitted for each. What enters the feed-forward block behind its
norm must be best, and behind a norm never worse than before it. With four layers the order among the others may
differ. The last but one layer, a little worse in the paper, is not a key function here.
"""

from experiments.curves import perplexity
from experiments.experiment import KNN_LM, Experiment, Need
from experiments.lab import BASE, Floats, Lab, Sight
from experiments.records import Findings, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import Verdict, lower

PAPER = {
    "ffn_input": 16.06, "ffn_input_before_norm": 17.06, "attention_input": 16.76, "attention_input_before_norm": 17.14,
    "model_output": 17.01, "model_output_before_norm": 17.07,
}  # fmt: skip
BEST = "ffn_input"
NAMES = {
    "ffn_input": "what enters the feed-forward block",
    "attention_input": "what enters attention",
    "model_output": "output",
}


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    """The base with every key, on the main corpus."""
    return [Sight(BASE, texts.main.name, key_function=name) for name in PAPER]


def run(lab: Lab) -> Findings:
    """A row per key."""
    losses: dict[str, Floats] = {}
    rows: list[tuple[str | float | None, ...]] = []
    for name, paper in PAPER.items():
        view = lab.view(Sight(BASE, lab.texts.main.name, key_function=name))
        losses[name] = -view.mixed
        rows.append((_said(name), paper, perplexity(-view.mixed), view.lmbda, view.temperature))
    documents = view.report.documents
    rows.insert(0, ("no datastore", 17.96, perplexity(-view.report.lm), None, None))
    verdicts: list[Verdict] = [
        lower(f"{_said(BEST)} is better than {_said(name)}", losses[BEST], losses[name], documents)
        for name in PAPER
        if name != BEST
    ]
    verdicts += [
        lower(
            f"{said}: behind the norm is better than before it", losses[name], losses[f"{name}_before_norm"], documents
        )
        for name, said in NAMES.items()
        if name != BEST
    ]
    columns = ("key", "paper (dev)", "perplexity", "lambda", "temperature")
    return Findings(
        (Table(f"Base beside a datastore of {lab.texts.main.name}", columns, tuple(rows)),), tuple(verdicts)
    )


def _said(name: str) -> str:
    before = name.endswith("_before_norm")
    return f"{NAMES[name.removesuffix('_before_norm')]}, {'before' if before else 'behind'} the norm"


EXPERIMENT = Experiment("The key", f"{KNN_LM}, Table 5 and Figure 3", __doc__, needs, run)
