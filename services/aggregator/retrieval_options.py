"""What a request asks to be mixed, as options of the mixer: its model id, `knn`, and the other sources by name."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from knnlm.cache_source import DEFAULT_SIZE
from knnlm.errors import InvalidRequest, KnnlmError, TooLarge, UnknownModel
from knnlm.options import CacheOptions, DomainOptions, KnnOptions, ReuseOptions, SearchOptions, options_of, record_of
from knnlm.sources import SOURCES, source_kind
from services.aggregator.schemas.mixing import DomainChoice, Knn, Sourced
from services.aggregator.settings import AggregatorSettings

MIXED = re.compile(r"(?=.)(?:\+(?P<domain>[^+~]+))?(?:~(?P<memory>[^+~]+))?", re.DOTALL)  # what follows the LM's name
RENAMED = {"passages": "neighbors", "passage_tokens": "neighbor_tokens", "entries": "passages"}
EXPLAINING = {"explain", "explain_tokens"}  # fields of `knn` in completions that are no retrieval
OF_KNN = frozenset(field.alias or name for name, field in Knn.model_fields.items())


@contextmanager
def named_as_asked(request: Sourced) -> Iterator[None]:
    """Errors name the field of the request, as the caller wrote it, whichever service or record refused its value."""
    try:
        yield
    except KnnlmError as err:
        if err.param is not None:
            asked = _asked(err.param, request)
            if err.message.startswith(f"{err.param} "):
                err.message = asked + err.message.removeprefix(err.param)
            err.param = asked
        raise


def _asked(param: str, request: Sourced) -> str:
    knn = request.knn
    if param == "domain" and knn is not None and knn.domains is not None:
        return "knn.domains"
    if param == "domain" and (knn is None or knn.domain is None) and "+" in (request.model or ""):
        return "model"
    if param == "memory.name" and "~" in (request.model or "") and request_memory(request) is None:
        return "model"
    if param == "prompt" and param not in type(request).model_fields:
        return request.given
    if param in ("text", "tokens") and getattr(request, "text", None) is None:
        return request.given
    if param.partition(".")[0] in OF_KNN:
        return f"knn.{param}"
    return param if param in type(request).model_fields else RENAMED.get(param, param)


def request_memory(request: Sourced) -> str | None:
    """The name of a memory in the request's own field."""
    name: str | None = getattr(getattr(request, "memory", None), "name", None)  # the field is made of a table
    return name


def short_name(model_id: str) -> str:
    """The last part of a path or hub id."""
    return model_id.rstrip("/").rsplit("/", 1)[-1]


def named_in(model: str | None, model_id: str) -> tuple[str | None, str | None]:
    """The domain and the memory in a name like pocket+law~med, each None where it has none. Raises UnknownModel for
    any other name."""
    name = short_name(model_id)
    if model is None or model in (name, model_id):
        return None, None
    found = MIXED.fullmatch(model.removeprefix(name)) if model.startswith(name) else None
    if found is None:
        raise UnknownModel(
            f"unknown model {model!r:.200}; known: {name}, and {name}+DOMAIN for every domain of /v1/domains, "
            f"{name}~MEMORY for every memory, {name}+DOMAIN~MEMORY for both",
            param="model",
        )
    return found["domain"], found["memory"]


def chosen(request: Sourced, model_id: str, settings: AggregatorSettings) -> tuple[str, dict[str, Any]]:
    """The model id to answer under, and the options of each source that is mixed; none for the LM alone.

    Raises UnknownModel, TooLarge, and InvalidRequest when model and knn or memory contradict each other, or no domain
    or memory is named.
    """
    sources: dict[str, Any] = {}  # Any: a record of options for each row of knnlm.sources.SOURCES
    domain, memory = named_in(request.model, model_id)
    others = memory is not None or any(getattr(request, name, None) is not None for name in SOURCES if name != "knn")
    retrieved = request.knn is not None and not (others and request.knn.model_fields_set <= EXPLAINING)
    if retrieved or domain is not None:
        sources["knn"] = _knn(request, domain, settings)
    for name in SOURCES:
        given = getattr(request, name, None)
        if name != "knn" and (given is not None or (name == "memory" and memory is not None)):
            values = {} if given is None else dict(vars(given))
            if name == "memory":
                values |= {"name": _memory(request, memory)}
            record = source_kind(name).options
            for setting in options_of(record):  # what a request leaves out and the settings have
                if values.get(setting) is None:
                    values[setting] = getattr(settings, setting, None)
            with _named_under(name):
                sources[name] = record_of(record, values)
    if "cache" in sources:
        sources["cache"] = _bounded(sources["cache"], settings.max_cache_size)
    domains = [d.domain for d in sources["knn"].domains] if "knn" in sources else []
    memories = [f"~{sources['memory'].name}"] if "memory" in sources else []
    return "+".join([short_name(model_id), *domains]) + "".join(memories), sources


def _memory(request: Sourced, named: str | None) -> str | None:
    """The name of the memory: that of the model, or the one given beside it."""
    asked = request_memory(request)
    if named is not None and asked not in (None, named):
        raise InvalidRequest(
            f"model {request.model} names memory {named}, memory.name another: give one of the two", param="memory.name"
        )
    return asked or named


def _knn(request: Sourced, named: str | None, settings: AggregatorSettings) -> KnnOptions:
    knn = Knn() if request.knn is None else request.knn
    if named is not None and (knn.domains is not None or knn.domain not in (None, named)):
        raise InvalidRequest(
            f"model {request.model} names domain {named}, knn names another: give one of the two", param="domain"
        )
    choices = _choices(knn, knn.domain if named is None else named)
    if len(choices) > settings.max_domains:
        raise TooLarge(f"at most {settings.max_domains} domains in one request, got {len(choices)}", param="domains")
    search = SearchOptions.of(vars(knn))
    if search.k is not None and search.k > settings.max_k:
        raise TooLarge(f"k must be at most {settings.max_k}, got {search.k}", param="k")
    return KnnOptions(
        domains=tuple(choices),
        search=search,
        combine=knn.combine,
        rule=knn.rule,
        on_datastore_error=request.on_datastore_error or settings.on_datastore_error,
        reuse=ReuseOptions() if knn.reuse is None else record_of(ReuseOptions, vars(knn.reuse)),
    )


def _bounded(cache: CacheOptions, most: int) -> CacheOptions:
    """The options with a size that is allowed, also where it is as tuned. Raises TooLarge."""
    if cache.size is not None and cache.size > most:
        raise TooLarge(f"size must be at most {most} (--max-cache-size), got {cache.size}", param="cache.size")
    return replace(cache, max_size=min(DEFAULT_SIZE, most))


@contextmanager
def _named_under(source: str) -> Iterator[None]:
    try:
        yield
    except InvalidRequest as err:
        err.param = f"{source}.{err.param}"
        raise


def _choices(knn: Knn, domain: str | None) -> list[DomainOptions]:
    if (domain is None) == (knn.domains is None):
        raise InvalidRequest("knn needs a domain: give either knn.domain or knn.domains", param="domain")
    if domain is not None:
        return [DomainOptions(domain, knn.version, knn.lmbda, knn.temperature)]
    if knn.version is not None:
        raise InvalidRequest("knn.version goes with knn.domain; give each of knn.domains its own", param="version")
    several = [DomainChoice(domain=d) if isinstance(d, str) else d for d in knn.domains or []]
    return [
        DomainOptions(
            d.domain,
            d.version,
            knn.lmbda if d.lmbda is None else d.lmbda,
            knn.temperature if d.temperature is None else d.temperature,
        )
        for d in several
    ]
