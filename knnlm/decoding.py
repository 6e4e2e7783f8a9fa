"""The single kNN-LM step and how a long text is cut into such steps. Pure: no I/O, no model, no clock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from knnlm.errors import InvalidRequest
from knnlm.messages import DomainInfo, ModelInfo
from knnlm.mixture import Component, mix, rule_weights
from knnlm.neighbors import Neighbors, add, neighbor_log_probs, target_log_probs, token_masses

__all__ = ["Mixed", "Retrieved", "Window", "choose_windows", "mix_distributions", "mix_targets", "plan_fed_windows",
           "plan_windows", "top_tokens"]  # fmt: skip

DEFAULT_WINDOW = 2048  # tokens fed at once when nobody says how many: a model that takes 131,072 would need minutes


@dataclass(frozen=True)
class Window:
    """tokens[start:end] is fed to the model, tokens[first:end] are predicted from it. bos: a token fed before them."""

    start: int
    end: int
    first: int
    bos: int | None = None

    def __len__(self) -> int:
        """Tokens that are fed."""
        return self.end - self.start + (self.bos is not None)

    @property
    def positions(self) -> npt.NDArray[np.int32]:
        """(end - first,) int32: positions in what is fed whose next token is a target."""
        before = self.start - (self.bos is not None)
        return np.arange(self.first - 1 - before, self.end - 1 - before, dtype=np.int32)

    def fed(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """(len(self),) int32: what the model is fed of a text's tokens."""
        inside = np.asarray(tokens[self.start : self.end])
        return inside if self.bos is None else np.concatenate([np.array([self.bos], np.int32), inside])


def choose_windows(
    model: ModelInfo,
    domains: Sequence[DomainInfo] = (),
    context_length: int | None = None,
    min_context: int | None = None,
) -> tuple[int, int]:
    """(context_length, min_context) for `plan_windows`, in tokens: asked for, else those that the keys of the first
    domain were made with, else DEFAULT_WINDOW or what the model takes, if that is less, and half of it.

    Raises InvalidRequest, naming the field, unless 2 <= context_length <= model.context_length and
    1 <= min_context < context_length.
    """
    length, least = context_length, min_context
    made_with = domains[0] if domains else None
    if length is None and made_with is not None and made_with.context_length is not None:
        length = min(made_with.context_length, model.context_length)
        if least is None and made_with.min_context is not None:
            least = min(made_with.min_context, length - 1)
    if length is None:
        length = min(DEFAULT_WINDOW, model.context_length)
    if not 2 <= length <= model.context_length:
        raise InvalidRequest(
            f"context_length must lie in [2, {model.context_length}], got {length}", param="context_length"
        )
    least = length // 2 if least is None else least
    if not 1 <= least < length:
        raise InvalidRequest(f"min_context must lie in [1, {length}), got {least}", param="min_context")
    return length, least


def plan_fed_windows(length: int, context_length: int, min_context: int, bos: int | None) -> list[Window]:
    """`plan_windows`, where windows after the first also feed `bos`: it counts among their `context_length` tokens."""
    if bos is None:
        return plan_windows(length, context_length, min_context)
    windows = plan_windows(length, context_length - 1, min(min_context, context_length - 2))
    return [replace(w, bos=bos) if w.start else w for w in windows]


def plan_windows(length: int, context_length: int, min_context: int) -> list[Window]:
    """Windows over a text of `length` tokens in which every token but the first is a target exactly once.

    A window feeds at most `context_length` tokens. Every target has at least `min_context` tokens before it in its
    window, or all there are. The last token of a window need not be fed; it is, so that windows of one length can be
    stacked. Raises InvalidRequest unless 1 <= min_context < context_length.
    """
    if not 1 <= min_context < context_length:
        raise InvalidRequest(
            f"min_context must lie in [1, context_length) = [1, {context_length}), got {min_context}",
            param="min_context",
        )
    windows: list[Window] = []
    first = 1
    while first < length:
        start = max(0, first - min_context) if windows else 0
        end = min(length, start + context_length)
        windows.append(Window(start, end, first))
        first = end
    return windows


@dataclass(frozen=True)
class Retrieved:
    """One domain's neighbors for n queries, and how they are to be mixed in."""

    domain: str
    neighbors: Neighbors
    temperature: float
    lmbda: float
    rule: str = "fixed"


@dataclass(frozen=True)
class Mixed:
    """The mixture and what it was made of; (n,) for targets or (n, V).

    knn_log_probs: log p_kNN, of several domains the mean by weight; rows that found nothing are all -inf. weight:
    (n,) what the retrieved distributions weigh together. domain_weights: (n,) per domain, only for "mixture".
    """

    log_probs: npt.NDArray[np.float64]
    lm_log_probs: npt.NDArray[np.floating]
    knn_log_probs: npt.NDArray[np.float64] | None
    weight: npt.NDArray[np.float64]
    domain_weights: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)


def mix_targets(
    lm_log_probs: npt.NDArray[np.floating],
    targets: npt.NDArray[np.integer],
    retrieved: Sequence[Retrieved],
    *,
    combine: str = "mixture",
) -> Mixed:
    """Log-probabilities of one given token per row: lm_log_probs (n,), targets (n,).

    combine: "mixture" gives each domain its own softmax and weight; "union" puts the neighbors of all domains into one
    softmax, for which temperature, lambda and rule must agree. Equals the same entries of `mix_distributions`.
    """
    if combine == "union" and len(retrieved) > 1:
        one = _united(retrieved)
        return _mix(lm_log_probs, [(one, target_log_probs(one.neighbors, targets, one.temperature))])
    _check(combine)
    return _mix(lm_log_probs, [(r, target_log_probs(r.neighbors, targets, r.temperature)) for r in retrieved])


def mix_distributions(
    lm_log_probs: npt.NDArray[np.floating], retrieved: Sequence[Retrieved], *, combine: str = "mixture"
) -> Mixed:
    """Whole distributions: lm_log_probs (n, V). See `mix_targets` for the rest."""
    vocab_size = lm_log_probs.shape[1]
    for part in retrieved:
        if part.neighbors.values.max(initial=-1) >= vocab_size:
            raise InvalidRequest(
                f"domain {part.domain} holds token {part.neighbors.values.max()}, the vocabulary has {vocab_size}"
            )
    if combine == "union" and len(retrieved) > 1:
        one = _united(retrieved)
        masses = add([token_masses(r.neighbors, r.temperature) for r in retrieved])
        return _mix(lm_log_probs, [(one, masses.normalized().dense(vocab_size))])
    _check(combine)
    dense = [neighbor_log_probs(r.neighbors, r.temperature).dense(vocab_size) for r in retrieved]
    return _mix(lm_log_probs, list(zip(retrieved, dense, strict=True)))


def top_tokens(log_probs: npt.NDArray[np.floating], n: int) -> npt.NDArray[np.int64]:
    """(min(n, V),) tokens of one (V,) distribution, likeliest first; equal ones by token id."""
    n = min(n, len(log_probs))
    if n < len(log_probs):
        # everything at least as likely as the n-th: argpartition alone would choose among ties arbitrarily
        threshold = np.partition(log_probs, len(log_probs) - n)[len(log_probs) - n]
        candidates = np.flatnonzero(log_probs >= threshold)
    else:
        candidates = np.arange(len(log_probs))
    return candidates[np.argsort(-log_probs[candidates], kind="stable")][:n]


def _mix(lm_log_probs: npt.NDArray[np.floating], parts: Sequence[tuple[Retrieved, npt.NDArray[np.float64]]]) -> Mixed:
    n = len(lm_log_probs)
    weights = [rule_weights(r.rule, r.neighbors, r.lmbda) for r, _ in parts]
    components = [Component(r.domain, log_probs, w) for (r, log_probs), w in zip(parts, weights, strict=True)]
    mixed = mix(lm_log_probs, components)
    total = np.sum(weights, axis=0) if weights else np.zeros(n)
    return Mixed(
        log_probs=mixed,
        lm_log_probs=lm_log_probs,
        knn_log_probs=_mean(components, total),
        weight=total,
        domain_weights={r.domain: w for (r, _), w in zip(parts, weights, strict=True)},
    )


def _mean(components: Sequence[Component], total: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """The components' mean by weight; by equal shares where all weights are 0, so that lambda 0 still shows p_kNN."""
    if not components:
        return None
    if len(components) == 1:
        return components[0].log_probs
    wide = (slice(None),) + (None,) * (components[0].log_probs.ndim - 1)
    result = np.full(components[0].log_probs.shape, -np.inf)
    with np.errstate(divide="ignore"):
        for c in components:
            share = np.where(total > 0, c.weight / np.where(total > 0, total, 1.0), 1 / len(components))
            result = np.logaddexp(result, c.log_probs + np.log(share)[wide])
    return result


def _united(retrieved: Sequence[Retrieved]) -> Retrieved:
    first = retrieved[0]
    for other in retrieved[1:]:
        if (other.temperature, other.lmbda, other.rule) != (first.temperature, first.lmbda, first.rule):
            raise InvalidRequest(
                "a union has one temperature, lambda and rule, got "
                f"{first.temperature:g}, {first.lmbda:g}, {first.rule} for {first.domain} and "
                f"{other.temperature:g}, {other.lmbda:g}, {other.rule} for {other.domain}",
                param="knn",
            )
    neighbors = Neighbors(
        np.concatenate([r.neighbors.distances for r in retrieved], axis=1),
        np.concatenate([r.neighbors.values for r in retrieved], axis=1),
    )
    return Retrieved("+".join(r.domain for r in retrieved), neighbors, first.temperature, first.lmbda, first.rule)


def _check(combine: str) -> None:
    if combine not in ("mixture", "union"):
        raise InvalidRequest(f"combine must be mixture or union, got {combine!r}", param="combine")
