"""What passes between the flow and the sources of a mixture: what a source is asked, and what it answers. Pure.

A source gives one component beside the language model's: a domain's neighbors, the text's own past, a second model.
knnlm/sources.py is the table of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from knnlm.attribution import Carrier
from knnlm.messages import PASSAGE_TOKENS, LmStatistics, SearchResult
from knnlm.neighbors import TokenMasses

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Stretch:
    """A part of one text: text[start:] up to the last predicted token was fed to the model.

    text: (t,) all of it from its beginning, what has not been predicted yet included when a known text is scored; only
    what stands before a predicted place may be looked at. predicted: (m,) places in the text whose token is predicted,
    ascending; the place after its end is len(text). state: what a source keeps from one stretch of the text to the
    next, under its own name. before: (b, d) keys of the b places before the first predicted one, where a source of the
    plan wants them and the state holds none (see knnlm.sources.Remembering). bos: a token that was fed before
    text[start:].
    """

    text: Ids
    start: int
    predicted: npt.NDArray[np.int64]
    state: dict[str, Any] = field(default_factory=dict)  # Any: each source's own
    before: npt.NDArray[np.floating] | None = None
    bos: int | None = None


@dataclass(frozen=True)
class Step:
    """n predictions that sources are asked about, those of the stretches one below the other.

    keys: (n, d), None when no source needs them. targets: (n,) the tokens whose probability is wanted, None for whole
    distributions. passages, passage_tokens: text to show around the nearest neighbors, as in SearchRequest. carriers:
    how many of the entries that gave a target most are wanted, with the text around them. cache: as in ForwardRequest.
    statistics: of the LM at the n predictions, where a rule of the plan looks at them.
    """

    stretches: Sequence[Stretch]
    keys: npt.NDArray[np.floating] | None = None
    targets: Ids | None = None
    passages: int = 0
    passage_tokens: int = PASSAGE_TOKENS
    carriers: int = 0
    cache: bool = False
    statistics: LmStatistics | None = None


@dataclass(frozen=True)
class Evidence:
    """What one source says of n predictions.

    log_probs: (n,) float64 of the targets; or, of whole distributions, masses that sum to one in each row, or (n, V)
    float64. -inf is a probability of zero. present: (n,) where the source has a distribution at all; elsewhere its
    weight goes back to the LM. features: (n,) float64 each, the numbers that its rule asked for. found: the searches it
    was made from, for showing. carried: of each target the entries that gave it most, where the step asked for carriers
    and the source has entries; else empty. skipped: (n,) where it was not searched, because its rule gave it no weight
    there beforehand, or what was found before leads there; empty for sources that are not searched.
    """

    present: npt.NDArray[np.bool_]
    log_probs: npt.NDArray[np.float64] | TokenMasses
    features: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    found: Sequence[SearchResult] = ()
    carried: Sequence[Sequence[Carrier]] = ()
    skipped: npt.NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))

    @property
    def of_targets(self) -> npt.NDArray[np.float64]:
        """(n,) of the targets, -inf where the source gives them nothing. Raises TypeError for whole distributions."""
        if not isinstance(self.log_probs, np.ndarray):
            raise TypeError("whole distributions were asked for, there are no targets")
        return self.log_probs

    def at(self, i: int, tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
        """(m,) log-probabilities of some tokens in row i of whole distributions."""
        if not isinstance(self.log_probs, TokenMasses):
            chosen: npt.NDArray[np.float64] = self.log_probs[i, tokens]
            return chosen
        known, log_masses = self.log_probs.row(i)
        if not len(known):
            return np.full(len(tokens), -np.inf)
        places = np.minimum(np.searchsorted(known, tokens), len(known) - 1)
        return np.where(known[places] == tokens, log_masses[places], -np.inf)

    def part(self, start: int, end: int) -> npt.NDArray[np.float64] | TokenMasses:
        """Rows start ... end - 1 of `log_probs`."""
        masses = self.log_probs
        return masses.part(start, end) if isinstance(masses, TokenMasses) else masses[start:end]

    def rows(self, start: int, end: int, vocab_size: int) -> npt.NDArray[np.float64]:
        """(end - start, V) of whole distributions, -inf where a row holds no mass."""
        part = self.part(start, end)
        return part.dense(vocab_size) if isinstance(part, TokenMasses) else part
