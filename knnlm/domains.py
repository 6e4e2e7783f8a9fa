"""Domains as components of the mixture: what holds for each of them in the end, asked for, else tuned, else refused."""

from dataclasses import dataclass, replace

from knnlm.errors import DatastoreMismatch, InvalidRequest
from knnlm.messages import DomainInfo, ModelInfo, Tuning
from knnlm.options import DEFAULT_K, DomainOptions, SearchOptions

__all__ = ["UsedDomain", "used_domain"]


@dataclass(frozen=True)
class UsedDomain:
    """What a domain is asked with in the end, and the version that answers."""

    domain: str
    version: str
    temperature: float
    lmbda: float
    search: SearchOptions
    window_bos: int | None = None  # fed at the beginning of windows after a text's first, as when its keys were made

    @property
    def k(self) -> int:
        return self.search.k or DEFAULT_K

    def as_json(self) -> dict[str, object]:
        """What answers say of it: domain, version, temperature, lmbda and k."""
        return {name: getattr(self, name) for name in ("domain", "version", "temperature", "lmbda", "k")}


def used_domain(options: DomainOptions, search: SearchOptions, info: DomainInfo, model: ModelInfo) -> UsedDomain:
    """The values that hold for a domain: asked for, else those of its tuning.

    Raises DatastoreMismatch, with both values, for a domain that another model, configuration, tokenizer or key
    function made, and InvalidRequest for a value that is neither asked for nor tuned.
    """
    recorded = ("config_sha256", "bos_token_id") if info.config_sha256 is not None else ()
    for name in ("weights_sha256", "tokenizer_sha256", "key_function", "key_dim", *recorded):
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
        search=search.or_else(_tuned_search(tuning, search, info.index)),
        window_bos=info.window_bos_token_id,
    )


def _tuned_search(tuning: Tuning | None, asked: SearchOptions, index: str) -> SearchOptions:
    """How to search by the tuning. What was fitted to another index than the one that answers does not hold."""
    if tuning is None:
        return SearchOptions(k=DEFAULT_K)
    if tuning.index != index:
        return SearchOptions(k=tuning.k)
    if asked.rescore is not None:  # the fitted candidates were for the other way of rescoring
        return replace(tuning.search, k=tuning.k, overfetch=None)
    return replace(tuning.search, k=tuning.k)


def _held(name: str, asked: float | None, tuned: float | None, domain: str) -> float:
    value = tuned if asked is None else asked
    if value is None:
        raise InvalidRequest(
            f"domain {domain} has not been tuned: give {name}, or run `knnlm tune {domain}`", param=name
        )
    return value
