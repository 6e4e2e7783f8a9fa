"""Where retrieval gains and loses most: contexts, what was retrieved, and from which document.

The paper shows names, dates and quotations (probabilities by retrieval and by the model: "development" .998 and .124,
"honour" .995 and .025, "1998" .959 and .503, "Carmen" .624 and .167), and admits a kind of error: what is plausible
in the neighbors' contexts and wrong in this one.

Here: the tokens with the largest gain and the largest loss, one of each document and each another token, with the
nearest neighbors' texts. Stated is only what can be tested: gains of tokens that begin a name or hold a digit are
larger than those of the other tokens.
"""

import numpy as np

from experiments.experiment import KNN_LM, Experiment, Need
from experiments.lab import BASE, Lab, Sight, View
from experiments.records import Findings, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import Verdict, by_interval, interval
from knnlm.datastore.reader import Datastore
from knnlm.evaluation.splits import Encoded, Part
from knnlm.tokenizer import Tokenizer

SHOWN, BEFORE, NEIGHBORS = 6, 12, 3
LEAST_PROBABILITY = 0.3  # of retrieval, for a gain, or of the model, for a loss: surprises alone are no example


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    """The base on every domain."""
    return [Sight(BASE, c.name) for c in texts.domains]


def run(lab: Lab) -> Findings:
    """Two tables per domain."""
    tables: list[Table] = []
    verdicts = []
    for corpus in lab.texts.domains:
        view = lab.view(Sight(BASE, corpus.name))
        documents = lab.documents(corpus.name, Part.REPORT)
        tokenizer = lab.model(BASE).tokenizer
        gain = view.knn - view.report.lm
        likely = np.exp(view.knn) > LEAST_PROBABILITY
        pieces = _pieces(documents, tokenizer)
        whole = np.array([bool(piece.strip()) and "\ufffd" not in piece for piece in pieces])  # what can be shown
        best = _one_of_each(np.where(likely & whole, gain, -np.inf), view)
        lost = _one_of_each(
            np.where(np.exp(view.report.lm) > LEAST_PROBABILITY, view.report.lm - view.knn, -np.inf), view
        )
        store = Datastore.open(lab.store(BASE, corpus.name))
        for title, rows in (("gains most", best), ("loses most", lost)):
            shown = tuple(_row(view, int(i), documents, store, tokenizer) for i in rows)
            columns = ("context → token", "p retrieved", "p model", "nearest neighbors (source: context → value)")
            tables.append(Table(f"Where retrieval {title}, {corpus.name}", columns, shown))
        verdicts.append(_names_and_numbers(corpus.name, view, pieces))
    return Findings(tuple(tables), tuple(verdicts))


def _pieces(documents: list[Encoded], tokenizer: Tokenizer) -> list[str]:
    """The text of every reported token."""
    return [tokenizer.decode(d.tokens[i : i + 1]) for d in documents for i in range(1, len(d.tokens))]


def _names_and_numbers(name: str, view: View, pieces: list[str]) -> Verdict:
    """Tokens with a capital or a digit: the gain of the mixture there less that elsewhere, documents drawn again."""
    special = np.array([any(c.isupper() or c.isdigit() for c in piece) for piece in pieces])
    gain = view.mixed - view.report.lm
    share = special.mean()
    weights = special / share - ~special / (1 - share)  # the mean of gain * weights is the difference of the means
    value, low, high = interval(gain * weights, view.report.documents)
    test = "mean gain of the mixture there less that elsewhere, bootstrap over documents"
    claim = f"tokens with a capital or a digit gain more than others, {name}"
    return Verdict(claim, by_interval(-high, -low), value, low, high, "nats per token", test)


def _one_of_each(scores: np.ndarray, view: View) -> list[int]:
    """The best rows, one of each document, each of another token."""
    found: dict[int, int] = {}
    tokens: set[int] = set()
    for row in np.argsort(-scores, kind="stable"):
        if np.isneginf(scores[row]) or len(found) == SHOWN:
            break
        token, document = int(view.report.targets[row]), int(view.report.documents[row])
        if document not in found and token not in tokens:
            found[document] = int(row)
            tokens.add(token)
    return list(found.values())


def _row(
    view: View, row: int, documents: list[Encoded], store: Datastore, tokenizer: Tokenizer
) -> tuple[str | float, ...]:
    seen = view.report
    if seen.held.depths is None or seen.neighbors.ids is None:
        raise ValueError("examples need places and ids")
    tokens = documents[int(seen.documents[row])].tokens
    at = int(seen.held.depths[row])
    context = tokenizer.decode(tokens[max(1, at - BEFORE) : at])
    near = store.passages(seen.neighbors.ids[row, :NEIGHBORS], BEFORE, 1)
    sources = "; ".join(
        f"{p.document}: …{_clean(tokenizer.decode(p.before))} → {_clean(tokenizer.decode(p.after))!r}" for p in near
    )
    said = f"…{_clean(context)} → {_clean(tokenizer.decode(tokens[at : at + 1]))!r}"
    return said, float(np.exp(view.knn[row])), float(np.exp(seen.lm[row])), sources


def _clean(text: str) -> str:
    """On one line, and no Markdown."""
    return "".join(f"\\{c}" if c in "*_`<>[]" else c for c in text.replace("\n", " ⏎ "))


EXPERIMENT = Experiment(
    "What retrieval finds", f"{KNN_LM}, Figure 6 and Tables 6 to 9", __doc__, needs, run, quotes=True
)
