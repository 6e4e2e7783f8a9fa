"""What a caller may choose about retrieval, and what holds in the end: asked for, else tuned, else refused. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from knnlm.errors import DatastoreMismatch, InvalidRequest
from knnlm.messages import DomainInfo, ModelInfo

__all__ = ["DEFAULT_K", "DomainOptions", "KnnOptions", "UsedDomain", "check_excluded", "used_domain"]

DEFAULT_K = 1024  # of the paper; a domain's tuning says otherwise
EXCLUDED_DOCUMENTS = 1024  # of one request
DOCUMENT_CHARACTERS = 4096  # of the id of each


@dataclass(frozen=True)
class DomainOptions:
    """One domain of a request. What is None is taken from the tuning that is stored with the domain."""

    domain: str
    version: str | None = None
    lmbda: float | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class KnnOptions:
    """How to retrieve and mix. `on_datastore_error`: "fail", or "lm_only" to answer from the LM and say so.

    exclude_documents: ids of documents whose entries do not count. Every domain must have every one of them.
    """

    domains: tuple[DomainOptions, ...]
    k: int | None = None
    combine: str = "mixture"
    nprobe: int | None = None
    rescore: bool | None = None
    overfetch: float | None = None
    rule: str = "fixed"
    on_datastore_error: str = "fail"
    ef_search: int | None = None
    exclude_documents: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [d.domain for d in self.domains]
        if not names or len(set(names)) != len(names):
            raise InvalidRequest(f"expected one or more distinct domains, got {names}", param="knn.domains")
        for d in self.domains:
            if d.lmbda is not None and not 0 <= d.lmbda <= 1:
                raise InvalidRequest(f"lambda must lie in [0, 1], got {d.lmbda}", param="knn.lambda")
            if d.temperature is not None and not 0 < d.temperature < math.inf:
                raise InvalidRequest(f"temperature must be > 0, got {d.temperature}", param="knn.temperature")
        if self.k is not None and self.k < 1:
            raise InvalidRequest(f"k must be at least 1, got {self.k}", param="knn.k")
        check_excluded(self.exclude_documents, "knn.exclude_documents")
        if self.on_datastore_error not in ("fail", "lm_only"):
            raise InvalidRequest(
                f"on_datastore_error must be fail or lm_only, got {self.on_datastore_error!r}",
                param="on_datastore_error",
            )


@dataclass(frozen=True)
class UsedDomain:
    """What a domain was asked with in the end, and the version that answered."""

    domain: str
    version: str
    temperature: float
    lmbda: float
    k: int


def used_domain(options: DomainOptions, k: int | None, info: DomainInfo, model: ModelInfo) -> UsedDomain:
    """The values that hold for a domain: asked for, else those of its tuning.

    Raises DatastoreMismatch, with both values, for a domain that another model, tokenizer or key function made, and
    InvalidRequest for a value that is neither asked for nor tuned.
    """
    for name in ("weights_sha256", "tokenizer_sha256", "key_function", "key_dim"):
        theirs, ours = getattr(info, name), getattr(model, name)
        if theirs != ours:
            raise DatastoreMismatch(
                f"domain {info.domain} was made with {name} {theirs} (model {info.model_id}), "
                f"the language model has {ours} (model {model.model_id})"
            )
    tuning = info.tuning
    return UsedDomain(
        info.domain,
        options.version or info.version,
        temperature=_held(
            "temperature", options.temperature, None if tuning is None else tuning.temperature, info.domain
        ),
        lmbda=_held("lambda", options.lmbda, None if tuning is None else tuning.lmbda, info.domain),
        k=k or (tuning.k if tuning else DEFAULT_K),
    )


def check_excluded(documents: Sequence[str], param: str) -> None:
    """Raises InvalidRequest for more ids of documents, or longer ones, than one request may name."""
    if len(documents) > EXCLUDED_DOCUMENTS:
        raise InvalidRequest(
            f"{param} may name at most {EXCLUDED_DOCUMENTS} documents, got {len(documents)}", param=param
        )
    longest = max(map(len, documents), default=0)
    if longest > DOCUMENT_CHARACTERS:
        raise InvalidRequest(
            f"{param} may name documents of at most {DOCUMENT_CHARACTERS} characters, got one of {longest}", param=param
        )


def _held(name: str, asked: float | None, tuned: float | None, domain: str) -> float:
    value = tuned if asked is None else asked
    if value is None:
        raise InvalidRequest(
            f"domain {domain} has not been tuned: give knn.{name}, or run `knnlm tune {domain}`", param=f"knn.{name}"
        )
    return value
