"""The mixture at one place, whole or in part: what a step asks, what it answers, and what a part leaves open. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from knnlm.attribution import Carrier
from knnlm.decoding import Mixed, Share
from knnlm.errors import DeadlineExceeded, Unavailable
from knnlm.evidence import Evidence
from knnlm.messages import PASSAGE_TOKENS, SearchResult
from knnlm.mixture import Component, mix
from knnlm.neighbors import TokenMasses
from knnlm.sampling import Known
from knnlm.sources import Carrying, Plan, Timings

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StepRequest:
    """One context whose next token is wanted.

    context: (t,) int32 with its BOS. temperature: of the sampling to come. known: tokens whose probability is needed
    whatever they are. whole: the whole row is needed. cache: whether the context's next step is to be expected, so that
    the model keeps what it computed. passages, passage_tokens: as in knnlm.evidence.Step. carriers: whether the row's
    `carried` will be asked. state: what sources keep from one step of this sequence to the next.
    """

    plan: Plan
    context: Ids
    temperature: float = 1.0
    known: Sequence[int] = ()
    whole: bool = False
    cache: bool = False
    passages: int = 0
    passage_tokens: int = PASSAGE_TOKENS
    carriers: bool = False
    state: dict[str, Any] = field(default_factory=dict)  # Any: as in knnlm.evidence.Stretch

    @property
    def way(self) -> tuple[object, ...]:
        """Sources are asked once for requests with equal ways."""
        return (self.plan, self.passages, self.passage_tokens, self.carriers)


@dataclass(frozen=True)
class Row:
    """The mixture at one place, as far as it is known.

    plan: that of the request, or the one without sources that went on after they failed. known: tokens with their
    log-probability in the mixture. lm_log_probs: (m,) of the same tokens. shares: what else was mixed; its row `at` is
    meant. found: the searches it was made from. timings: seconds per stage of the round.
    """

    plan: Plan
    known: Known
    lm_log_probs: Floats
    shares: Sequence[Share]
    at: int
    found: Sequence[SearchResult] = ()
    timings: Timings = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every token that is not known has a probability of zero."""
        return self.known.bound == -math.inf

    @property
    def searches_skipped(self) -> int:
        """Sources that were not searched here."""
        return sum(int(share.evidence.skipped[self.at : self.at + 1].sum()) for share in self.shares)

    def log_probs_of(self, token: int) -> tuple[float, float]:
        """log p and log p_LM, in nats, of a token among `known`."""
        place = int(np.searchsorted(self.known.tokens, token))
        return float(self.known.log_probs[place]), float(self.lm_log_probs[place])

    def alone(self) -> tuple[Mixed, list[SearchResult]]:
        """The mixture and the searches with this place as their only row; it must be complete."""
        one = slice(self.at, self.at + 1)
        shares = [Share(s.name, s.kind, s.weight[one], _one_row(s.evidence, self.at)) for s in self.shares]
        found = [result.rows(self.at, self.at + 1) for result in self.found]
        return Mixed(self.known.log_probs[None], self.lm_log_probs[None], shares), found

    async def carried(self, token: int, count: int, passage_tokens: int) -> tuple[list[Sequence[Carrier]], str | None]:
        """Entries that gave the token most, for each of `components` (see knnlm.sources.Carrying), and why some are
        missing, else None. Raises what a source raises, unless it is optional."""
        found: list[Sequence[Carrier]] = []
        missing: str | None = None
        for source, share in zip(self.plan.sources, self.shares, strict=True):
            entries: Sequence[Sequence[Carrier]] = [[]]
            if isinstance(source, Carrying):
                here = [result.rows(self.at, self.at + 1) for result in share.evidence.found]
                try:
                    entries = await source.carried(here, np.array([token]), count, passage_tokens)
                except (Unavailable, DeadlineExceeded) as err:
                    if not source.optional:
                        raise
                    missing = err.message
            found.append(entries[0])
        return found, missing

    def components(self, token: int) -> list[tuple[str, str, float, float | None]]:
        """Name, kind, weight and log p of each source; None where it has no distribution here."""
        wanted = np.array([token])
        return [
            (
                share.name,
                share.kind,
                float(share.weight[self.at]),
                float(share.evidence.at(self.at, wanted)[0]) if share.evidence.present[self.at] else None,
            )
            for share in self.shares
        ]

    def top(self, n: int) -> list[tuple[int, float]] | None:
        """The n likeliest tokens with their log-probabilities; None where others may be among them."""
        log_probs = self.known.log_probs
        n = min(n, len(log_probs))
        if not n:
            return []
        least = np.partition(log_probs, len(log_probs) - n)[len(log_probs) - n]
        if least <= self.known.bound and not self.complete:
            return None
        places = np.flatnonzero(log_probs >= least)
        places = places[np.lexsort((self.known.tokens[places], -log_probs[places]))][:n]
        return [(int(self.known.tokens[p]), float(log_probs[p])) for p in places]


def _one_row(evidence: Evidence, at: int) -> Evidence:
    log_probs = evidence.log_probs
    if isinstance(log_probs, TokenMasses):
        tokens, log_masses = log_probs.row(at)
        one: TokenMasses | Floats = TokenMasses(np.array([0, len(tokens)]), tokens, log_masses)
    else:
        one = log_probs[at : at + 1]
    return Evidence(evidence.present[at : at + 1], one, skipped=evidence.skipped[at : at + 1])


def stored_tokens(shares: Sequence[Share], at: int) -> npt.NDArray[np.int64]:
    """Tokens to which some component beside the LM gives a probability in row `at`.

    Raises TypeError for one that gives all tokens a probability.
    """
    parts: list[npt.NDArray[np.integer]] = [np.empty(0, np.int64)]
    for share in shares:
        if not isinstance(share.evidence.log_probs, TokenMasses):
            raise TypeError(f"{share.name} has whole distributions, of which no part is enough")
        parts.append(share.evidence.log_probs.row(at)[0])
    return np.concatenate(parts).astype(np.int64)


def partial(
    tokens: npt.NDArray[np.integer],
    lm_log_probs: npt.NDArray[np.floating],
    lm_bound: float,
    log_power_sum: float,
    temperature: float,
    shares: Sequence[Share],
    at: int,
) -> tuple[Known, Floats]:
    """What is known of the mixture in row `at`, and the LM's log-probabilities of the same tokens.

    tokens: (m,) distinct, among them all that another component gives a probability. lm_log_probs: (m,) theirs.
    lm_bound: no other token is likelier to the LM. log_power_sum: log of the sum of p_LM^(1/temperature) over all.
    """
    order = np.argsort(tokens)
    tokens, lm = tokens[order].astype(np.int64), lm_log_probs[order].astype(np.float64)
    left = _log_left(shares, at)
    rest = _log_rest(lm, log_power_sum, temperature, left)
    return Known(tokens, mixed_at(lm, shares, at, tokens), left + lm_bound, rest), lm


def mixed_at(lm: Floats, shares: Sequence[Share], at: int, tokens: npt.NDArray[np.integer]) -> Floats:
    """(m,) log p of some tokens in row `at`."""
    components = [Component(s.name, s.evidence.at(at, tokens)[None], s.weight[at : at + 1]) for s in shares]
    mixed: Floats = mix(lm[None], components)[0]
    return mixed


def _log_left(shares: Sequence[Share], at: int) -> float:
    """log of the LM's weight in row `at`."""
    left = 1.0 - sum(float(share.weight[at]) for share in shares)
    return math.log(left) if left > 0 else -math.inf


def _log_rest(lm: Floats, log_power_sum: float, temperature: float, log_left: float) -> float:
    """log of the sum of p^(1/temperature) over the tokens that are not among `lm`'s: there p is the LM's share alone.

    log_power_sum: log of the sum of p_LM^(1/temperature) over all tokens.
    """
    power = 1 / (temperature or 1.0)
    share = float(np.logaddexp.reduce(power * lm)) - log_power_sum  # log of what these tokens have of all
    return power * log_left + log_power_sum + math.log(-math.expm1(share)) if share < 0 else -math.inf
