"""Lambda rules: from what a source and the LM say of each prediction to the weight of the source. Pure.

A rule is one row of RULES: it weighs, it is fitted, and it says which numbers it looks at. What `fit`
gives is stored with a domain's tuning and given to `weights` again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from knnlm.before_search import Projection, expected_gain, fit_gain
from knnlm.errors import InvalidRequest
from knnlm.evidence import Evidence
from knnlm.gate import LOGIT_RANGE, fit_gate, gate_logits, sigmoid
from knnlm.messages import LmStatistics, required

Parameters = Mapping[str, float | Sequence[float]]
Weights = npt.NDArray[np.float64]

FIXED, GATE, AUTO = "fixed", "gate", "auto"  # auto: whatever rule is better than fixed, when a domain is tuned
# One unseen token that no neighbor stores has probability zero at lambda 1, whatever the fitting documents said.
LARGEST_LAMBDA = 0.99
BISECTIONS = 50
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
BUCKET_TOKENS = 100  # in each bucket, at least
FREE_TOKENS = 2000  # in each bucket, from which on a farther one may have a larger lambda than a nearer one
PRIOR_TOKENS = 200  # tokens that say what all together say, added to those of each bucket
BUCKET_FOLDS = 4  # parts of the documents, each of which judges how many buckets the others should have
HIDDEN = 8  # units of the network of a gate
# before the names of parameters of gates that were fitted together, in knnlm.tuning_records.Tuning.cache
KNN_GATE, CACHE_GATE = "knn_gate.", "gate."
# the expected gain of retrieval, in nats, by what is known before a search; and below which there is none
GAIN, SKIP_BELOW = "gain", "skip_below"


@dataclass(frozen=True)
class Observed:
    """What was seen of n held-out tokens. lm_log_probs: (n,) of those tokens; evidence: of them; lm: for rules that
    ask for statistics. document_of: (n,) the number of each token's document; None where it is not known."""

    lm_log_probs: npt.NDArray[np.floating]
    evidence: Evidence
    lm: LmStatistics | None = None
    document_of: npt.NDArray[np.int64] | None = None

    def at(self, rows: npt.NDArray[np.bool_]) -> "Observed":
        """What was seen of the tokens at `rows`, (n,); evidence of targets."""
        evidence, lm = self.evidence, self.lm
        features = {name: values[rows] for name, values in evidence.features.items()}
        return Observed(
            self.lm_log_probs[rows],
            Evidence(evidence.present[rows], evidence.of_targets[rows], features),
            None if lm is None else lm.at(rows),
            None if self.document_of is None else self.document_of[rows],
        )

    @property
    def ratio(self) -> Weights:
        """(n,) p_source / p_LM - 1 of the tokens, by which the likelihood of a weight is 1 + weight * ratio."""
        return likelihood_ratio(self.lm_log_probs, self.evidence.of_targets)

    @property
    def groups(self) -> npt.NDArray[np.int64]:
        """(n,) documents, as far as they are known; else as many stretches as BUCKET_FOLDS need."""
        if self.document_of is not None:
            return self.document_of
        n = len(self.lm_log_probs)
        return np.arange(n) * (5 * BUCKET_FOLDS) // max(n, 1)


def part_of(parameters: Parameters, prefix: str) -> Parameters:
    """The parameters whose names begin with the prefix, which is taken off."""
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


class Rule(Protocol):
    """One way to weigh a source. statistics: whether it looks at the LM's own. features: names of the evidence's
    features that it looks at."""

    statistics: bool
    features: Sequence[str]

    def weights(self, evidence: Evidence, lm: LmStatistics | None, parameters: Parameters) -> Weights:
        """(n,) in [0, 1]. Where the source is absent the weight does not count. Raises KeyError for parameters that
        `fit` of this rule did not give."""
        ...

    def fit(self, observed: Observed) -> Parameters:
        """The parameters that make the observed tokens likeliest. Raises TypeError for whole distributions."""
        ...


class Fixed:
    """The same weight everywhere (Khandelwal et al. 2020, arXiv 1911.00172)."""

    statistics = False
    features: Sequence[str] = ()

    def weights(self, evidence: Evidence, lm: LmStatistics | None, parameters: Parameters) -> Weights:
        del lm
        return np.full(len(evidence.present), parameters["lambda"])

    def fit(self, observed: Observed) -> Parameters:
        present = observed.evidence.present  # elsewhere the LM has all the weight, whatever lambda is
        log_probs = observed.evidence.of_targets
        return {"lambda": best_lambda(observed.lm_log_probs[present], log_probs[present])}


class Bins:
    """A weight for each bucket of the nearest distance, of equally many tokens (Drozdov et al. 2022, arXiv 2210.15859).

    How many buckets is decided by what documents that were left out say. Where a bucket holds few tokens, weights fall
    with the distance and lean towards that of all.
    """

    statistics = False
    features: Sequence[str] = ("nearest",)

    def weights(self, evidence: Evidence, lm: LmStatistics | None, parameters: Parameters) -> Weights:
        del lm
        places = np.searchsorted(np.atleast_1d(parameters["edges"]), evidence.features["nearest"])
        return np.asarray(parameters["lambdas"], np.float64)[places]

    def fit(self, observed: Observed) -> Parameters:
        """edges: (b - 1,) between the buckets, the upper one included. lambdas: (b,)."""
        present = observed.evidence.present
        nearest = observed.evidence.features["nearest"][present]
        order = np.argsort(nearest, kind="stable")
        nearest, ratio = nearest[order], observed.ratio[present][order]
        _, group = np.unique(observed.groups[present][order], return_inverse=True)
        counts = [b for b in BUCKETS if b == 1 or b * BUCKET_TOKENS <= len(nearest)]
        losses = dict.fromkeys(counts, 0.0)
        for fold in range(BUCKET_FOLDS if len(counts) > 1 else 0):
            left_out = group % BUCKET_FOLDS == fold
            for b in counts:
                edges, lambdas = buckets(nearest[~left_out], ratio[~left_out], b)
                lmbda = lambdas[np.searchsorted(edges, nearest[left_out])]
                losses[b] -= float(np.log1p(lmbda * ratio[left_out]).sum())
        edges, lambdas = buckets(nearest, ratio, min(counts, key=lambda b: losses[b]))
        return {"edges": edges.tolist(), "lambdas": lambdas.tolist()}


def buckets(nearest: Weights, ratio: Weights, count: int) -> tuple[Weights, Weights]:
    """The inner edges of `count` buckets with equally many of the distances (n,), ascending, and lambda of each bucket.

    ratio: (n,) as in Observed. On these tokens never worse than one lambda for all.
    """
    overall = _best_lambda(ratio)
    if count == 1 or not len(nearest):
        return np.empty(0), np.array([overall])
    edges = np.unique(np.quantile(nearest, np.arange(1, count) / count))
    ends = [0, *np.searchsorted(nearest, edges, side="right").tolist(), len(nearest)]
    blocks: list[tuple[int, int, float, int]] = []  # where it begins and ends, lambda, buckets in it
    for start, end in pairwise(ends):
        blocks.append((start, end, _best_lambda(ratio[start:end]) if end > start else 0.0, 1))
        while len(blocks) > 1 and end - start < FREE_TOKENS and blocks[-1][2] > blocks[-2][2]:  # adjacent violators
            (first, _, _, before), (_, last, _, after) = blocks[-2:]
            blocks[-2:] = [(first, last, _best_lambda(ratio[first:last]), before + after)]
    lambdas = np.repeat([block[2] for block in blocks], [block[3] for block in blocks])
    tokens = len(nearest) / (len(edges) + 1)
    return edges, (tokens * lambdas + PRIOR_TOKENS * overall) / (tokens + PRIOR_TOKENS)


class Gate:
    """A small network over what is known of each prediction (He et al. 2021, arXiv 2109.04212; see knnlm/gate.py).

    features: of the evidence, by name. statistics: whether it looks at the LM's entropy and largest probability. keys:
    whether it also looks at the LM's key, where it was fitted to keys. Without features it decides before anything is
    searched. hidden: units of the network; 0: a logistic function.
    """

    def __init__(
        self, features: Sequence[str], *, statistics: bool = True, keys: bool = False, hidden: int = HIDDEN
    ) -> None:
        self.features = features
        self.statistics = statistics
        self._keys = keys
        self._hidden = hidden

    def weights(self, evidence: Evidence, lm: LmStatistics | None, parameters: Parameters) -> Weights:
        inputs = self.inputs(evidence, lm)
        if self._keys and lm is not None and np.size(parameters["linear"]) > inputs.shape[1]:
            inputs = np.concatenate([inputs, required(lm.keys)], axis=1)
        return LARGEST_LAMBDA * sigmoid(gate_logits(inputs, parameters))

    def fit(self, observed: Observed) -> Parameters:
        """The parameters that knnlm.gate.gate_logits takes."""
        present = observed.evidence.present
        ratio = observed.ratio[present]
        best = _best_lambda(ratio)
        inputs = self.inputs(observed.evidence, observed.lm)[present]
        if not len(ratio):
            return {"bias": -LOGIT_RANGE, "linear": [0.0] * inputs.shape[1]}
        groups = observed.groups[present]
        keys = observed.lm.keys if self._keys and observed.lm is not None else None
        if keys is None:
            return fit_gate(inputs, ratio, groups, start=best, largest=LARGEST_LAMBDA, hidden=self._hidden)
        projection = Projection.of(keys[present])
        inputs = np.concatenate([inputs, projection.places(keys[present])], axis=1)
        fitted = fit_gate(inputs, ratio, groups, start=best, largest=LARGEST_LAMBDA, hidden=self._hidden)
        return projection.unfolded(fitted)

    def inputs(self, evidence: Evidence, lm: LmStatistics | None) -> Weights:
        """(n, m) what the network looks at beside keys: 0 where the source is absent, its features may be infinite."""
        columns = [INPUTS[name](evidence.features[name]) for name in self.features]
        if self.statistics:
            if lm is None:
                raise TypeError("statistics of the LM were not asked for")
            columns += [lm.entropy.astype(np.float64), np.exp(lm.largest_log_prob.astype(np.float64))]
        return np.where(evidence.present[:, None], np.stack(columns, axis=1), 0.0)


INPUTS: Mapping[str, Callable[[Weights], Weights]] = {
    "nearest": np.sqrt,
    "nearness": np.asarray,
    "agreement": np.asarray,
    "distinct": np.log1p,
}  # how a feature goes into a network


# relative: NEST's confidence (Li et al. 2024, arXiv 2405.19325) is a logistic function of the nearest distance as a
# share of the farthest one, as here: its center is -bias / linear, its width -1 / linear
LOOKING = Gate(tuple(INPUTS))
RULES: dict[str, Rule] = {
    FIXED: Fixed(),
    "bins": Bins(),
    "relative": Gate(("nearness",), statistics=False, hidden=0),
    GATE: LOOKING,
    "gate_lm": Gate((), keys=True),
}


def rule(name: str) -> Rule:
    """The rule of that name. Raises InvalidRequest, naming the known ones."""
    if name not in RULES:
        raise InvalidRequest(f"unknown rule {name!r}; known: {', '.join(RULES)}", param="rule")
    return RULES[name]


@dataclass(frozen=True)
class Weighing:
    """A rule with its parameters. asked: whether the caller gave them, rather than a tuning."""

    rule: str
    parameters: Parameters
    asked: bool = False

    def __post_init__(self) -> None:
        rule(self.rule)

    @property
    def statistics(self) -> bool:
        return rule(self.rule).statistics

    @property
    def early(self) -> bool:
        """Whether the LM's statistics alone decide, so that what has weight 0 need not be asked for."""
        return decides_early(self.rule)

    def weights(self, evidence: Evidence, lm: LmStatistics | None) -> Weights:
        """(n,) the weight at each prediction, 0 where the source is absent."""
        weights = np.where(evidence.present, rule(self.rule).weights(evidence, lm, self.parameters), 0.0)
        if lm is None or SKIP_BELOW not in self.parameters:
            return weights
        gain = expected_gain(lm, np.asarray(self.parameters[GAIN], np.float64))
        return np.where(gain < self.parameters[SKIP_BELOW], 0.0, weights)

    def wanted(self, lm: LmStatistics | None) -> npt.NDArray[np.bool_] | None:
        """(n,) where an early rule has a weight at all; None for other rules, and where the LM told no statistics."""
        if lm is None or not self.early:
            return None
        return self.weights(_everywhere(lm), lm) > 0


def decides_early(name: str) -> bool:
    """Whether that rule looks at the LM's statistics and at nothing that is retrieved."""
    return rule(name).statistics and not rule(name).features


def check_skip(name: str, share: float) -> None:
    """Raises InvalidRequest unless 0 <= share < 1, and for a share of searches that the rule cannot leave out."""
    if not 0 <= share < 1:
        raise InvalidRequest(f"skip must lie in [0, 1), got {share}", param="skip")
    if share and (name == AUTO or not decides_early(name)):
        early = ", ".join(known for known in RULES if decides_early(known))
        raise InvalidRequest(
            f"skip goes with a rule that decides before the search ({early}), got {name}", param="skip"
        )


def skipping(name: str, parameters: Parameters, observed: Observed, share: float) -> Parameters:
    """The parameters by which nothing is searched for where retrieval is expected to gain least: at most `share` of the
    observed tokens. The gain of log-likelihood is expected as least squares fit it to what is known before a search.
    Raises InvalidRequest for a rule that decides after the search, and unless 0 <= share < 1."""
    check_skip(name, share)
    if not share:
        return parameters
    if observed.lm is None:
        raise InvalidRequest(f"rule {name} looks at statistics of the LM, which were not observed", param="skip")
    weights = Weighing(name, parameters).weights(observed.evidence, observed.lm)
    there = observed.evidence.present
    gain = fit_gain(observed.lm.at(there), np.log1p(weights[there] * observed.ratio[there]))
    below = float(np.quantile(expected_gain(observed.lm, gain), share))
    return {**parameters, GAIN: gain.tolist(), SKIP_BELOW: below}


def _everywhere(lm: LmStatistics) -> Evidence:
    """What an early rule is asked with: nothing is known of the source yet."""
    n = len(lm.entropy)
    return Evidence(np.ones(n, np.bool_), np.zeros(n))


def shared(weights: Sequence[Weights], asked: Sequence[bool], looking: Sequence[bool] = ()) -> list[Weights]:
    """The weights (n,) of several sources as they can stand beside each other.

    asked: which the caller gave; they stay. The others were fitted. Where one of these looks at each prediction, the
    fitted ones make one softmax with the LM, by their odds against it: o_c / (1 + sum of o_j), o = weight / (1 -
    weight). What then still adds up to more than LARGEST_LAMBDA is scaled by one factor, among the fitted ones, to add
    up to what the asked ones leave of it: continuous in every weight.
    """
    fitted = [i for i, given in enumerate(asked) if not given]
    if len(weights) < 2 or not fitted:
        return list(weights)
    found = list(weights)
    if len(fitted) > 1 and any(looking[i] for i in fitted if looking):
        for i, weight in zip(fitted, softmax([weights[i] for i in fitted]), strict=True):
            found[i] = weight
    total = np.sum(found, axis=0)
    crowded = total > LARGEST_LAMBDA
    if not crowded.any():
        return found
    together = np.sum([found[i] for i in fitted], axis=0)
    rest = np.clip(LARGEST_LAMBDA - (total - together), 0, 1)
    factor = np.divide(rest, together, out=np.ones_like(rest), where=crowded & (together > 0))
    return [w if given else w * factor for w, given in zip(found, asked, strict=True)]


def softmax(weights: Sequence[Weights]) -> list[Weights]:
    """Weights (n,), each fitted as if it stood alone with the LM, as parts of one softmax by their odds against it.
    Where the others are 0 a weight stays as it is, bit for bit."""
    odds = [np.minimum(w, LARGEST_LAMBDA) / (1 - np.minimum(w, LARGEST_LAMBDA)) for w in weights]
    return [w / (1 + (1 - w) * np.sum(odds[:i] + odds[i + 1 :], axis=0)) for i, w in enumerate(weights)]


def best_lambda(lm_log_probs: npt.NDArray[np.floating], knn_log_probs: npt.NDArray[np.floating]) -> float:
    """The lambda in [0, LARGEST_LAMBDA] that maximises sum of log((1 - lambda) p_LM + lambda p_kNN); both (n,).

    With r = p_kNN / p_LM - 1 the derivative is sum of r / (1 + lambda r), which falls: its root is bisected.
    """
    return _best_lambda(likelihood_ratio(lm_log_probs, knn_log_probs))


def likelihood_ratio(lm_log_probs: npt.NDArray[np.floating], knn_log_probs: npt.NDArray[np.floating]) -> Weights:
    """(n,) p_kNN / p_LM - 1, at least -1."""
    # beyond e^300 a ratio changes nothing any more, and the sum of many must stay finite
    gap = np.minimum(knn_log_probs.astype(np.float64) - lm_log_probs, 300.0)
    ratio: Weights = np.expm1(gap)
    return ratio


def _best_lambda(ratio: Weights) -> float:
    def slope(lmbda: float) -> float:
        return float((ratio / (1 + lmbda * ratio)).sum())

    if not len(ratio) or slope(0.0) <= 0:
        return 0.0
    if slope(LARGEST_LAMBDA) >= 0:
        return LARGEST_LAMBDA
    low, high = 0.0, LARGEST_LAMBDA
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return low
