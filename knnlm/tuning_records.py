"""What was fitted for a domain, and what was measured to choose it, as manifests keep it and services answer it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from knnlm.options import SearchOptions


@dataclass(frozen=True)
class SearchQuality:
    """One way to search that was measured while tuning. perplexity: of the held-out text. chosen: the one stored."""

    name: str
    search: SearchOptions
    perplexity: float
    queries_per_second: float | None = None
    chosen: bool = False


@dataclass(frozen=True)
class RuleQuality:
    """A lambda rule that was compared while tuning, fitted to some documents and measured on the others. perplexity: of
    all of them. difference, low, high: of the mean negative log-likelihood from that of the rule "fixed", in nats, and
    its 95 % interval over documents; below zero the rule is better. chosen: the one stored."""

    name: str
    perplexity: float
    difference: float = 0.0
    low: float = 0.0
    high: float = 0.0
    chosen: bool = False


@dataclass(frozen=True)
class Tuning:
    """Fitted on documents that are in neither the datastore nor any reported figure. Perplexities of those.

    rule, parameters: the lambda rule and what was fitted for it; `lmbda` is that of the rule "fixed". search: how to
    search, as far as it was fitted, with the index `index`. quality: what was measured to choose it. cache: lambda,
    theta and size of the continuous cache beside this domain, and knn_lambda, the weight of retrieval beside the cache;
    gate.* and knn_gate.*, the parameters of a gate for each, where these are better than the two weights; empty where
    they were not fitted. rules: what was measured to choose the rule.
    """

    temperature: float
    lmbda: float
    k: int
    lm_perplexity: float
    knn_perplexity: float
    tokens: int
    documents: int
    rule: str = "fixed"
    parameters: Mapping[str, float | Sequence[float]] = field(default_factory=dict)
    search: SearchOptions = field(default_factory=SearchOptions)
    index: str | None = None
    quality: Sequence[SearchQuality] = ()
    cache: Mapping[str, float | Sequence[float]] = field(default_factory=dict)
    rules: Sequence[RuleQuality] = ()
