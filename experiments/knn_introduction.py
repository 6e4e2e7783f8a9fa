"""What the idea rests on: contexts that say the same lie close together, and nearest neighbors know what comes next.

The paper says so in its introduction, by the example of "Dickens is the author of" and "Dickens wrote", and has no
number for it.

Here: twenty facts in two wordings each. Wordings of one fact must be closer than entries of the datastore drawn at
random; that they are closer than another fact in the same words is asked too, and a small model will hardly show it,
since its keys follow the last words. Of held-out text, the nearest neighbor must store the token that came more often
than an entry at random does, and more often than one at random with the same last token.
"""

import numpy as np
import numpy.typing as npt

from experiments.experiment import KNN_LM, Experiment, Need
from experiments.lab import BASE, Floats, Lab, Sight
from experiments.records import Cell, Findings, Table
from experiments.scale import Scale
from experiments.texts import Texts
from experiments.verdicts import Verdict, higher, lower
from knnlm.datastore.reader import Datastore
from knnlm.evaluation.splits import Part
from knnlm.messages import ForwardRequest, required

WORDINGS = (
    ("{} is the author of", "{} wrote"),
    ("{} was born in", "the birthplace of {} is"),
    ("the price of {} went up to", "{} now costs"),
    ("{} can be found in", "the best place to look for {} is"),
)
NAMES = (
    ("Dickens", "Austen", "Tolstoy", "Shakespeare", "Goethe"), ("Mozart", "Newton", "Darwin", "Lincoln", "Curie"),
    ("bread", "coffee", "oil", "gold", "sugar"), ("iron", "water", "salt", "wood", "sand"),
)  # fmt: skip
DRAWN = 4096  # entries of the datastore that stand for all

Keys = npt.NDArray[np.float32]
Ints = npt.NDArray[np.integer]


def needs(texts: Texts, _scale: Scale) -> list[Need]:
    """The base on the main corpus."""
    return [Sight(BASE, texts.main.name)]


def run(lab: Lab) -> Findings:
    """A row per wording, and one per rule of what comes next."""
    corpus = lab.texts.main.name
    view = lab.view(Sight(BASE, corpus))
    store = Datastore.open(lab.store(BASE, corpus))
    rows = np.sort(np.random.default_rng(0).permutation(len(store.keys))[:DRAWN])
    drawn = np.asarray(store.keys[rows], np.float32)
    table, closer = wordings(_keys(lab, 0), _keys(lab, 1), drawn)

    seen = view.report
    tokens = [d.tokens for d in lab.documents(corpus, Part.REPORT)]
    if seen.held.depths is None:
        raise ValueError("the last tokens of contexts need their places")
    last = np.array([tokens[d][at - 1] for d, at in zip(seen.documents, seen.held.depths, strict=True)])
    documents = list(store.live_rows())
    values = np.asarray(store.values)
    before = np.concatenate([[0], values[:-1]])
    before[np.cumsum([0, *(row.entries for _, row in documents)])[:-1]] = [
        store.tokens_of(document, 0, 1)[0] for document, _ in documents
    ]
    hits = (seen.neighbors.values[:, 0] == seen.targets).astype(np.float64)
    chances = {
        "an entry at random": shares(values, seen.targets),
        "one at random with the same last token": pair_shares(before, values, last, seen.targets),
    }
    verdicts = [
        higher(
            f"the nearest neighbor stores what came more often than {name}", hits, found, seen.documents,
            "of all tokens",
        )
        for name, found in chances.items()
    ]  # fmt: skip
    stored = [("the nearest neighbor", float(hits.mean())), *((n, float(c.mean())) for n, c in chances.items())]
    next_token = Table(f"Share that stores the token that came, {corpus}", ("", "share"), tuple(stored))
    return Findings((table, next_token), (*closer, *verdicts))


def wordings(first: Keys, second: Keys, drawn: Keys) -> tuple[Table, list[Verdict]]:
    """Keys (20, d) of facts in either wording, five facts to a pair of wordings, beside drawn (n, d) of a datastore."""
    facts = np.arange(len(first))
    other = facts // 5 * 5 + (facts + 1) % 5  # the same words, another fact
    apart, same_words = ((first - second) ** 2).sum(1), ((first - first[other]) ** 2).sum(1)
    random = ((first[:, None] - drawn[None]) ** 2).sum(2)
    nearer: Floats = (random < apart[:, None]).mean(1)
    rows: list[tuple[Cell, ...]] = []
    for number, (one, two) in enumerate(WORDINGS):
        of = slice(5 * number, 5 * number + 5)
        numbers = (apart[of].mean(), same_words[of].mean(), random[of].mean(), nearer[of].mean())
        rows.append((f"{one.format('…')} / {two.format('…')}", *map(float, numbers)))
    columns = ("wordings", "d² of the two", "d² to another fact in the same words", "d² to entries at random",
               "share of entries that are nearer")  # fmt: skip
    half = np.full(len(facts), 0.5)
    verdicts = [
        lower("two wordings of a fact are closer than an entry at random", nearer, half, facts),
        lower("they are closer than another fact in the same words", np.log(apart), np.log(same_words), facts),
    ]
    units = ("share of entries that are nearer less a half", "log of d² over d²")
    tests = "first less second, bootstrap over 20 facts"
    judged = [
        Verdict(v.claim, v.outcome, v.value, v.low, v.high, u, tests) for v, u in zip(verdicts, units, strict=True)
    ]
    return Table("Twenty facts in two wordings", columns, tuple(rows)), judged


def shares(values: Ints, targets: Ints) -> Floats:
    """The share (n,) of entries, of which `values` are stored, that store each target."""
    counts = np.bincount(values, minlength=int(targets.max()) + 1)
    return np.asarray(counts[targets] / len(values), np.float64)


def pair_shares(before: Ints, values: Ints, last: Ints, targets: Ints) -> Floats:
    """The share (n,) of the entries behind the token `last` that store the target; 0 where there is none."""
    width = int(max(values.max(), targets.max())) + 1
    pairs, counts = np.unique(before.astype(np.int64) * width + values, return_counts=True)
    asked = last.astype(np.int64) * width + targets
    at = np.minimum(np.searchsorted(pairs, asked), len(pairs) - 1)
    found = np.where(pairs[at] == asked, counts[at], 0)
    behind = np.bincount(before, minlength=int(last.max()) + 1)[last]
    return np.asarray(found / np.maximum(behind, 1), np.float64)


def _keys(lab: Lab, wording: int) -> Keys:
    """Keys (20, d) of the contexts of all facts in one wording."""
    lm = lab.model(BASE)
    texts = [pair[wording].format(name) for pair, names in zip(WORDINGS, NAMES, strict=True) for name in names]
    tokens = [lm.tokenizer.encode(text) for text in texts]
    ends = [np.array([len(one) - 1], np.int32) for one in tokens]
    return required(lm.forward(ForwardRequest(tokens, ends, keys=True)).keys).astype(np.float32)


EXPERIMENT = Experiment("What it rests on", f"{KNN_LM}, section 1", __doc__, needs, run)
