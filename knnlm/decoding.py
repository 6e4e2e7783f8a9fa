"""The single kNN-LM step, and how a long text is cut into steps. Pure: no I/O, no model, no clock."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from knnlm.errors import InvalidRequest
from knnlm.evidence import Evidence
from knnlm.messages import DomainInfo, LmStatistics, ModelInfo
from knnlm.mixture import Component, mix
from knnlm.rules import FIXED, shared
from knnlm.sources import Source

MIX_BYTES = 1 << 24  # float64 probabilities mixed at a time, for each component
DEFAULT_WINDOW = 2048  # tokens fed at once when nobody says how many: a model that takes 131,072 would need minutes


def end_of_context(context: npt.NDArray[np.int32], length: int, bos_token_id: int | None) -> npt.NDArray[np.int32]:
    """The last `length` tokens of a context; one that begins with the BOS keeps it, and the last length - 1."""
    if len(context) <= length:
        return context
    begin = context[:1] if bos_token_id is not None and context[0] == bos_token_id else context[:0]
    return np.concatenate([begin, context[len(context) - length + len(begin) :]])


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
class Share:
    """One component of a mixture as it was mixed: `weight` (n,), 0 where the component is absent."""

    name: str
    kind: str
    weight: npt.NDArray[np.float64]
    evidence: Evidence

    def row(self, i: int, vocab_size: int) -> npt.NDArray[np.float64] | None:
        """(V,) log-probabilities at prediction i of whole distributions, None where the component is absent."""
        return self.evidence.rows(i, i + 1, vocab_size)[0] if self.evidence.present[i] else None


@dataclass(frozen=True)
class Mixed:
    """The mixture and what it was made of; log-probabilities (n,) of targets or (n, V).

    components: those beside the LM, whose weight is what the others leave.
    """

    log_probs: npt.NDArray[np.float64]
    lm_log_probs: npt.NDArray[np.floating]
    components: Sequence[Share] = ()

    @property
    def weight(self) -> npt.NDArray[np.float64]:
        """(n,) what the components weigh together; less than lambda where one found nothing."""
        return np.sum([c.weight for c in self.components], axis=0) if self.components else np.zeros(len(self.log_probs))

    def last(self, n: int) -> "Mixed":
        """What it says of the last n of its targets."""
        start = len(self.log_probs) - n
        components = []
        for c in self.components if start else ():
            found = c.evidence
            evidence = Evidence(
                found.present[start:],
                found.of_targets[start:],
                carried=found.carried[start:],
                skipped=found.skipped[start:],
            )
            components.append(Share(c.name, c.kind, c.weight[start:], evidence))
        return Mixed(self.log_probs[start:], self.lm_log_probs[start:], components) if start else self

    def mean_row(self, i: int, kind: str) -> npt.NDArray[np.float64] | None:
        """(V,) at prediction i, the mean by weight of the components of that kind; None where all are absent."""
        rows = [(c.weight[i : i + 1], c.row(i, self.log_probs.shape[1])) for c in self.components if c.kind == kind]
        present = [(weight, row[None]) for weight, row in rows if row is not None]
        return _mean(present)[0] if present else None

    def mean(self, kind: str) -> npt.NDArray[np.float64] | None:
        """That mean for every prediction, in the shape of log_probs, -inf where all are absent; None without any."""
        chosen = [c for c in self.components if c.kind == kind]
        if not chosen:
            return None
        n, shape = len(self.log_probs), self.log_probs.shape
        return _mean(
            [(c.weight, c.evidence.rows(0, n, shape[1]) if len(shape) == 2 else c.evidence.of_targets) for c in chosen]
        )

    @property
    def knn_log_probs(self) -> npt.NDArray[np.float64] | None:
        """log p_kNN, see `mean`."""
        return self.mean("knn")


def weighed(sources: Sequence[Source], evidence: Sequence[Evidence], lm: LmStatistics | None = None) -> list[Share]:
    """What each source answered with its weight, as `mix_evidence` mixes it."""
    answers = list(zip(sources, evidence, strict=True))
    looking = [s.weighing.rule != FIXED for s in sources]
    alone = [s.weighing.weights(found, lm) for s, found in answers]
    weights = shared(alone, [s.weighing.asked for s in sources], looking)
    return [Share(s.name, s.kind, w, found) for (s, found), w in zip(answers, weights, strict=True)]


def mix_evidence(
    lm_log_probs: npt.NDArray[np.floating],
    sources: Sequence[Source] = (),
    evidence: Sequence[Evidence] = (),
    lm: LmStatistics | None = None,
) -> Mixed:
    """The mixture of the LM with what each source answered: of targets, lm_log_probs (n,), or whole distributions
    (n, V).

    lm: statistics, for rules that look at them. Whole distributions are mixed a few rows at a time: beside the result,
    a block of MIX_BYTES is held for each component. What is mixed of one row does not depend on the others.
    """
    shares = weighed(sources, evidence, lm)
    if lm_log_probs.ndim == 1:
        components = [Component(s.name, s.evidence.of_targets, s.weight) for s in shares]
        return Mixed(mix(lm_log_probs, components), lm_log_probs, shares)
    if not shares:
        return Mixed(lm_log_probs.astype(np.float64), lm_log_probs)
    n, vocab_size = lm_log_probs.shape
    mixed = np.empty((n, vocab_size))
    step = max(1, MIX_BYTES // (8 * vocab_size))
    for start in range(0, n, step):
        end = min(start + step, n)
        components = [Component(s.name, s.evidence.part(start, end), s.weight[start:end]) for s in shares]
        mixed[start:end] = mix(lm_log_probs[start:end], components)
    return Mixed(mixed, lm_log_probs, shares)


def top_tokens(log_probs: npt.NDArray[np.floating], n: int) -> npt.NDArray[np.int64]:
    """(min(n, V),) tokens of one (V,) distribution, likeliest first; equal ones by token id."""
    n = min(n, len(log_probs))
    if n == 0:
        return np.empty(0, np.int64)
    if n < len(log_probs):
        # everything at least as likely as the n-th: argpartition alone would choose among ties arbitrarily
        threshold = np.partition(log_probs, len(log_probs) - n)[len(log_probs) - n]
        candidates = np.flatnonzero(log_probs >= threshold)
    else:
        candidates = np.arange(len(log_probs))
    return candidates[np.argsort(-log_probs[candidates], kind="stable")][:n]


def _mean(parts: Sequence[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]) -> npt.NDArray[np.float64]:
    """The mean of log_probs by weight (n,), of (weight, log_probs) parts; by equal shares where all weights are 0, so
    that lambda 0 still shows p_kNN."""
    if len(parts) == 1:
        return parts[0][1]
    total = np.sum([weight for weight, _ in parts], axis=0)
    wide = (slice(None),) + (None,) * (parts[0][1].ndim - 1)
    result = np.full(parts[0][1].shape, -np.inf)
    with np.errstate(divide="ignore"):
        for weight, log_probs in parts:
            share = np.where(total > 0, weight / np.where(total > 0, total, 1.0), 1 / len(parts))
            result = np.logaddexp(result, log_probs + np.log(share)[wide])
    return result
