"""What the aggregator answers, as records: made of its JSON by knnlm.wire.jsonable, fields of the same names.

`lmbda` is "lambda" in JSON. A field that a newer service adds is passed over. docs/api.md says what each means.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knnlm.messages import DomainInfo


@dataclass(frozen=True)
class UsedDomain:
    """A domain that was mixed, and what was used for it. lmbda: None with a rule that has no one lambda."""

    domain: str
    version: str
    k: int
    lmbda: float | None
    temperature: float
    rule: str


@dataclass(frozen=True)
class UsedMemory:
    """A memory that was mixed. model_id, fingerprint: of the model that answered; None where its weight is 0."""

    name: str
    lmbda: float
    model_id: str | None
    fingerprint: str | None


@dataclass(frozen=True)
class TokenProbability:
    """p_knn: None without retrieval, and where nothing was found."""

    token_id: int
    token: str
    p: float
    p_lm: float
    p_knn: float | None


@dataclass(frozen=True)
class Component:
    """One distribution of a mixture at one context. p: of each token of `top`; None where it found nothing.
    searches_skipped: 1 where nothing was searched."""

    name: str
    kind: str
    weight: float
    p: Sequence[float] | None
    searches_skipped: int = 0


@dataclass(frozen=True)
class Distribution:
    """(V,) probabilities in order of token ids."""

    p: npt.NDArray[np.float32]
    p_lm: npt.NDArray[np.float32]
    p_knn: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Neighbor:
    """distance: squared L2. weight: its share of its domain's p_knn. position: of the token in the document."""

    domain: str
    distance: float
    weight: float
    token_id: int
    token: str
    document: str
    position: int
    before: str
    after: str


@dataclass(frozen=True)
class NextToken:
    """The next-token distribution after one context. lmbda: what all components but the LM weighed there."""

    context_tokens: int
    lmbda: float
    top: Sequence[TokenProbability]
    components: Sequence[Component]
    distribution: Distribution | None = None
    neighbors: Sequence[Neighbor] | None = None


@dataclass(frozen=True)
class NextTokens:
    """One result for each context. degraded: why the answer is the LM's alone; None when it is as asked."""

    model: str
    domains: Sequence[UsedDomain]
    degraded: str | None
    results: Sequence[NextToken]
    memories: Sequence[UsedMemory] = ()


@dataclass(frozen=True)
class ScoredToken:
    """Natural logarithms; None stands for minus infinity, which JSON cannot say."""

    token_id: int
    token: str
    log_p: float | None
    log_p_lm: float
    log_p_knn: float | None
    lmbda: float


@dataclass(frozen=True)
class ScoredComponent:
    """One distribution of the mixture, at every scored token."""

    name: str
    kind: str
    weight: Sequence[float]
    log_p: Sequence[float | None]
    searches_skipped: int = 0


@dataclass(frozen=True)
class Scored:
    """A scored text: every token but the first, which nothing precedes."""

    model: str
    domains: Sequence[UsedDomain]
    degraded: str | None
    first_token_id: int
    tokens: Sequence[ScoredToken]
    total_log_p: float | None
    total_log_p_lm: float
    perplexity: float | None
    perplexity_lm: float
    context_length: int
    min_context: int
    components: Sequence[ScoredComponent]
    memories: Sequence[UsedMemory] = ()


@dataclass(frozen=True)
class Model:
    id: str
    created: int
    owned_by: str
    max_model_len: int
    stale: str | None = None


@dataclass(frozen=True)
class ModelList:
    data: Sequence[Model]


@dataclass(frozen=True)
class DomainList:
    domains: Sequence[DomainInfo]


@dataclass(frozen=True)
class DomainReplica:
    """One replica of the datastore service. version: the one it answers from; None when it does not answer."""

    address: str
    version: str | None
    state: str
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class DomainStatus(DomainInfo):
    """A domain, and what each replica that serves it says of it now."""

    replicas: Sequence[DomainReplica]


@dataclass(frozen=True)
class Tokenized:
    """token_strs: what each token shows, where that was asked for."""

    count: int
    max_model_len: int
    tokens: Sequence[int]
    token_strs: Sequence[str] | None = None


@dataclass(frozen=True)
class Detokenized:
    prompt: str
