"""What the key is: which tensor of which layer stands for a context.

The paper (dev, k 1024): none 17.96; output 17.07; output behind its norm 17.01; what enters the feed-forward block,
behind the norm 16.06, before it 17.06; what enters attention, behind the norm 16.76, before it 17.14. The last but
one layer is a little worse in each place, without numbers.

Here: all six of the last layer and the four of the layer before, whose output is what enters the last one's attention;
temperature and lambda fitted for each. What enters the last feed-forward block behind its norm must be best, behind a
norm never worse than before it, and a layer never worse than the layer before. With four layers the order among the
others may differ.
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
BEFORE = "@-2"  # the last but one layer
EVERY = (*PAPER, *(f"{name}{BEFORE}" for name in PAPER if not name.startswith("model_output")))
BEST = "ffn_input"
NAMES = {
    "ffn_input": "what enters the feed-forward block",
    "attention_input": "what enters attention",
    "model_output": "output",
}


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    """The base with every key, on the main corpus."""
    return [Sight(BASE, texts.main.name, key_function=name) for name in EVERY]


def run(lab: Lab) -> Findings:
    """A row per key."""
    losses: dict[str, Floats] = {}
    rows: list[tuple[str | float | None, ...]] = []
    for name in EVERY:
        view = lab.view(Sight(BASE, lab.texts.main.name, key_function=name))
        losses[name] = -view.mixed
        rows.append((_said(name), PAPER.get(name), perplexity(-view.mixed), view.lmbda, view.temperature))
    documents = view.report.documents
    rows.insert(0, ("no datastore", 17.96, perplexity(-view.report.lm), None, None))
    verdicts: list[Verdict] = [
        lower(f"{_said(BEST)} is better than {_said(name)}", losses[BEST], losses[name], documents)
        for name in EVERY
        if name != BEST
    ]
    verdicts += [
        lower(
            f"{said}: behind the norm is better than before it", losses[name], losses[f"{name}_before_norm"], documents
        )
        for name, said in NAMES.items()
        if name != BEST
    ]
    verdicts += [
        lower(f"{_said(name)}: better than in the layer before", losses[name], losses[f"{name}{BEFORE}"], documents)
        for name in PAPER
        if f"{name}{BEFORE}" in losses and name != BEST
    ]
    columns = ("key", "paper (dev)", "perplexity", "lambda", "temperature")
    return Findings(
        (Table(f"Base beside a datastore of {lab.texts.main.name}", columns, tuple(rows)),), tuple(verdicts)
    )


def _said(name: str) -> str:
    name, _, layer = name.partition("@")
    before = name.endswith("_before_norm")
    said = f"{NAMES[name.removesuffix('_before_norm')]}, {'before' if before else 'behind'} the norm"
    return f"{said}, last layer but one" if layer else said


EXPERIMENT = Experiment("The key", f"{KNN_LM}, Table 5 and Figure 3", __doc__, needs, run)
