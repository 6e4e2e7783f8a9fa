"""What lambda rules and the continuous cache are worth on whole held-out documents, on each of several corpora.

    python -m benchmarks.rules [--text CORPUS ...] [--text CORPUS ...] [--size N] [--queries N] [--k N]

Each --text is a corpus of its own. Everything is fitted to four fifths of the held-out documents and measured on the
other fifth, five times; temperature and theta alone are fitted to all. Beside each perplexity stands its difference
from retrieval at one lambda, with the 95 % interval when whole documents are drawn again and again. The last table:
perplexity where a rule that looks at the language model alone leaves out a share of the searches.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.data import DOMAIN, MIN_CONTEXT, Prepared, prepare
from benchmarks.harness import SMALL, figure, table
from knnlm.evaluation.cache_fit import fit_cache, seen_together
from knnlm.evaluation.collect import HeldOut, find, observe
from knnlm.evaluation.rule_choice import FOLDS, held_out_losses, held_out_losses_together, interval
from knnlm.evaluation.splits import encode
from knnlm.evaluation.tuning import Observations, fit, losses, seen
from knnlm.index.searcher import Searcher
from knnlm.lm.model import LanguageModel
from knnlm.options import SearchOptions
from knnlm.rules import RULES, Weighing, skipping

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of the searches that are left out
EARLY = "gate_lm"
GOALS = {"bins or gate": 0.99, "half of the searches": 1.0, "cache beside retrieval": 1.0}

Losses = npt.NDArray[np.float64]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", type=Path, nargs="+", action="append", metavar="PATH",
        help="documents of one corpus (default: docstrings of packages)",
    )  # fmt: skip
    parser.add_argument("--size", type=int, default=SMALL, help=f"entries of each datastore (default {SMALL})")
    parser.add_argument("--queries", type=int, default=20_000, help="held-out tokens of each (default 20000)")
    parser.add_argument("--k", type=int, default=256, help="neighbors (default 256)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="taken as by every program; here it changes nothing, what is drawn is always the same",
    )
    options = parser.parse_args()
    for text in options.text or [[]]:
        prepared = prepare(options.size, text, queries=options.queries)
        name = ", ".join(path.parent.name if path.stem == "docs" else path.stem for path in text) or "docstrings"
        compare(name, prepared, options.k)


def compare(name: str, prepared: Prepared, k: int) -> None:
    """Print the tables and figures of one corpus."""
    lm = LanguageModel.load(str(prepared.model))
    held_out = observe(lm, encode(prepared.documents, lm.tokenizer), min_context=MIN_CONTEXT, statistics=True)
    with closing(Searcher.open(prepared.path)) as searcher:
        observations = find(searcher, DOMAIN, held_out, SearchOptions(k=k))
    documents = documents_of(held_out)
    temperature = fit(observations).tuning.temperature
    mixed = mixtures(held_out, observations, temperature)
    found = dict(held_out_losses(observations, temperature, tuple(RULES)))
    fixed = found.pop("fixed")
    rows = {**mixed, **{f"+ kNN, {rule}": loss for rule, loss in found.items()}}
    shown = [[row, *measured(loss, fixed, documents)] for row, loss in rows.items()]
    table([name, "perplexity", "beside one lambda", "95 % interval"], shown)
    print()
    skipped = skipping_losses(observations, temperature)
    shown = [[f"{share:.0%}", *measured(loss, fixed, documents)] for share, loss in skipped.items()]
    table([f"{name}, {EARLY}: searches left out", "perplexity", "beside one lambda", "95 % interval"], shown)
    ratios = {row: ratio(loss, fixed) for row, loss in rows.items()}
    half = min(skipped, key=lambda share: abs(share - 0.5))
    alone = np.minimum(mixed["+ kNN"].mean(), mixed["+ cache"].mean())
    values = {
        "bins or gate": min(ratios["+ kNN, bins"], ratios["+ kNN, gate"]),
        "half of the searches": ratio(skipped[half], fixed),
        "cache beside retrieval": float(np.exp(mixed["+ kNN + cache"].mean() - alone)),
    }
    others = {
        "bins or gate": "one lambda",
        "half of the searches": "one lambda for all",
        "cache beside retrieval": "the better of both alone",
    }
    for what, value in values.items():
        figure(
            f"{what} / {others[what]}: perplexity, {name}", value, GOALS[what], better="less",
            size=prepared.entries, tokens=len(fixed), documents=int(documents.max()) + 1, k=k,
            one_lambda=round(float(np.exp(fixed.mean())), 4),
            ratios={row: round(value, 5) for row, value in ratios.items()},
            skipped={f"{share:.3f}": round(ratio(loss, fixed), 5) for share, loss in skipped.items()},
        )  # fmt: skip


def mixtures(held_out: HeldOut, observations: Observations, temperature: float) -> Mapping[str, Losses]:
    """Negative log-probabilities (n,) of the LM alone, with cache, with retrieval and with both: with weights, and at
    last with gates, fitted together to the other documents."""
    cache = fit_cache(held_out)
    knn, past = seen_together(held_out, observations.neighbors, temperature, cache.theta, cache.size)
    together = held_out_losses_together([knn, past])
    alone = {name: held_out_losses_together([seen])["fixed"] for name, seen in (("+ cache", past), ("+ kNN", knn))}
    lm = {"LM": -held_out.lm_log_probs.astype(np.float64)}
    return {**lm, **alone, "+ kNN + cache": together["fixed"], "+ kNN + cache, gates": together["gate"]}


def skipping_losses(observations: Observations, temperature: float) -> dict[float, Losses]:
    """Negative log-probabilities (n,) with EARLY, by the share of the searches that was left out, whose parameters and
    threshold were fitted to the other documents."""
    observed = seen(observations, temperature, [EARLY])
    if observed.document_of is None or observed.lm is None:
        raise ValueError("documents and statistics are needed")
    fold = np.unique(observed.document_of, return_inverse=True)[1] % FOLDS
    result = {}
    fitted = [RULES[EARLY].fit(observed.at(fold != left_out)) for left_out in range(FOLDS)]
    for share in SHARES:
        loss, asked = np.empty(len(fold)), 0
        for left_out, parameters in enumerate(fitted):
            rows = fold == left_out
            measured_on = observed.at(rows)
            weighing = Weighing(EARLY, skipping(EARLY, parameters, observed.at(~rows), share))
            loss[rows] = losses(measured_on, weighing)
            wanted = weighing.wanted(measured_on.lm)
            asked += 0 if wanted is None else int(wanted.sum())
        result[1 - asked / len(fold)] = loss
    return result


def documents_of(held_out: HeldOut) -> npt.NDArray[np.int64]:
    """(n,) from 0 on."""
    if held_out.document_of is None:
        raise ValueError("documents are needed")
    return np.unique(held_out.document_of, return_inverse=True)[1]


def ratio(loss: Losses, fixed: Losses) -> float:
    return float(np.exp((loss - fixed).mean()))


def measured(loss: Losses, fixed: Losses, documents: npt.NDArray[np.int64]) -> Sequence[str]:
    """Perplexity, difference, interval; as a row shows them."""
    low, high = interval(loss - fixed, documents)
    return (
        f"{np.exp(loss.mean()):.4f}",
        f"{ratio(loss, fixed) - 1:+.2%}",
        f"{np.expm1(low):+.2%} to {np.expm1(high):+.2%}",
    )


if __name__ == "__main__":
    main()
