"""The messages of knnlm/messages.py as dicts that JSON can hold, and back.

Names are those of the dataclasses, but `lmbda` is "lambda". Arrays are written in one encoding per message, and read in
either; see arrays.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from knnlm.errors import InvalidRequest
from knnlm.messages import (
    DomainInfo,
    ForwardRequest,
    ForwardResult,
    Memory,
    ModelInfo,
    Passage,
    SearchQuality,
    SearchRequest,
    SearchResult,
    Tuning,
)
from knnlm.neighbors import Neighbors
from knnlm.options import SEARCH_OPTIONS, SearchOptions
from knnlm.wire.arrays import FLOATS, INT32, INT64, Array, ListBudget, array_from_json, array_to_json

__all__ = [
    "domain_from_json", "domain_to_json", "forward_request_from_json", "forward_request_to_json",
    "forward_result_from_json", "forward_result_to_json", "model_from_json", "model_to_json",
    "search_request_from_json", "search_request_to_json", "search_result_from_json", "search_result_to_json",
    "tuning_to_json",
]  # fmt: skip

Json = Mapping[str, Any]  # what json.loads gives: any type, checked field by field below


def forward_request_to_json(request: ForwardRequest, encoding: str) -> dict[str, object]:
    budget = ListBudget()
    return {
        "tokens": [array_to_json(tokens, encoding, budget) for tokens in request.tokens],
        "positions": [array_to_json(positions, encoding, budget) for positions in request.positions],
        "full": request.full,
        "targets": _array(request.targets, encoding, budget),
        "top_n": request.top_n,
        "keys": request.keys,
        "statistics": request.statistics,
        "encoding": encoding,
    }


def forward_request_from_json(given: Json) -> ForwardRequest:
    return ForwardRequest(
        tokens=_arrays(given, "tokens"),
        positions=_arrays(given, "positions"),
        full=_get(given, "full", bool, False),
        targets=_optional(given, "targets", INT32, 1),
        top_n=_get(given, "top_n", int, 0),
        keys=_get(given, "keys", bool, False),
        statistics=_get(given, "statistics", bool, False),
    )


def forward_result_to_json(result: ForwardResult, encoding: str) -> dict[str, object]:
    budget = ListBudget()
    return {
        "log_probs": _array(result.log_probs, encoding, budget),
        "target_log_probs": _array(result.target_log_probs, encoding, budget),
        "top_tokens": _array(result.top_tokens, encoding, budget),
        "top_log_probs": _array(result.top_log_probs, encoding, budget),
        "keys": _array(result.keys, encoding, budget),
        "entropy": _array(result.entropy, encoding, budget),
        "largest_log_prob": _array(result.largest_log_prob, encoding, budget),
        "fingerprint": result.fingerprint,
        "timings": dict(result.timings),
    }


def forward_result_from_json(given: Json) -> ForwardResult:
    return ForwardResult(
        log_probs=_optional(given, "log_probs", FLOATS[:1], 2),
        target_log_probs=_optional(given, "target_log_probs", FLOATS[:1], 1),
        top_tokens=_optional(given, "top_tokens", INT32, 2),
        top_log_probs=_optional(given, "top_log_probs", FLOATS[:1], 2),
        keys=_optional(given, "keys", FLOATS, 2),
        entropy=_optional(given, "entropy", FLOATS[:1], 1),
        largest_log_prob=_optional(given, "largest_log_prob", FLOATS[:1], 1),
        fingerprint=_get(given, "fingerprint", str, ""),
        timings=_get(given, "timings", dict, {}),
    )


def model_to_json(info: ModelInfo) -> dict[str, object]:
    return dict(vars(info))


def model_from_json(given: Json) -> ModelInfo:
    kinds = {"vocab_size": int, "context_length": int, "key_dim": int}
    fields = {name: _get(given, name, kinds.get(name, str)) for name in _names(ModelInfo) if not name.endswith("_id")}
    return ModelInfo(
        **fields,
        model_id=_get(given, "model_id", str),
        bos_token_id=_get(given, "bos_token_id", int, None),
        eos_token_id=_get(given, "eos_token_id", int, None),
    )


def search_request_to_json(request: SearchRequest, encoding: str) -> dict[str, object]:
    """Without the domain, which is in the path."""
    budget, queries = ListBudget(), request.queries
    packed = queries if queries.dtype == np.float16 else queries.astype(np.float32, copy=False)
    fields = {name: value for name, value in vars(request).items() if name not in ("domain", "queries", "options")}
    fields["exclude_entries"] = _array(request.exclude_entries, encoding, budget)
    fields |= search_options_to_json(request.options)
    return {"queries": array_to_json(packed, encoding, budget), **fields, "encoding": encoding}


def search_request_from_json(domain: str, given: Json) -> SearchRequest:
    return SearchRequest(
        domain=domain,
        queries=_required(given, "queries", FLOATS, 2),
        options=search_options_from_json(given),
        version=_get(given, "version", str, None),
        ids=_get(given, "ids", bool, False),
        passages=_get(given, "passages", int, 0),
        passage_tokens=_get(given, "passage_tokens", int, SearchRequest.passage_tokens),
        exclude_entries=_optional(given, "exclude_entries", INT64, 1),
    )


def search_options_to_json(options: SearchOptions) -> dict[str, object]:
    """What is asked for."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in options.asked().items()}


def search_options_from_json(given: Json) -> SearchOptions:
    values = {
        name: _strings(given, name) if option.kind is tuple else _get(given, name, option.kind, None)
        for name, option in SEARCH_OPTIONS.items()
    }
    return SearchOptions.of(values)


def search_result_to_json(result: SearchResult, encoding: str) -> dict[str, object]:
    budget = ListBudget()
    return {
        "domain": result.domain,
        "version": result.version,
        "distances": array_to_json(result.neighbors.distances, encoding, budget),
        "values": array_to_json(result.neighbors.values, encoding, budget),
        "ids": _array(result.neighbors.ids, encoding, budget),
        "passages": [[_passage_to_json(passage, encoding, budget) for passage in row] for row in result.passages],
        "timings": dict(result.timings),
    }


def search_result_from_json(given: Json) -> SearchResult:
    return SearchResult(
        domain=_get(given, "domain", str),
        version=_get(given, "version", str),
        neighbors=Neighbors(
            _required(given, "distances", FLOATS[:1], 2),
            _required(given, "values", INT32, 2),
            _optional(given, "ids", INT64, 2),
        ),
        passages=[[_passage_from_json(passage) for passage in row] for row in _get(given, "passages", list)],
        timings=_get(given, "timings", dict, {}),
    )


def domain_to_json(info: DomainInfo) -> dict[str, object]:
    tuning = None if info.tuning is None else tuning_to_json(info.tuning)
    memory = None if info.memory is None else dict(vars(info.memory))
    lists = {"versions": list(info.versions), "indexes": list(info.indexes)}
    return {**vars(info), **lists, "tuning": tuning, "memory": memory}


def tuning_to_json(tuning: Tuning) -> dict[str, object]:
    fields = {"lambda" if name == "lmbda" else name: value for name, value in vars(tuning).items()}
    lists = {n: v if isinstance(v, int | float) else list(v) for n, v in tuning.parameters.items()}
    quality = [{**vars(row), "search": search_options_to_json(row.search)} for row in tuning.quality]
    return {**fields, "parameters": lists, "search": search_options_to_json(tuning.search), "quality": quality}


def domain_from_json(given: Json) -> DomainInfo:
    tuning, memory = _get(given, "tuning", dict, None), _get(given, "memory", dict, None)
    kinds: dict[str, type] = {"entries": int, "documents": int, "key_dim": int, "versions": list}
    apart = (
        "indexes", "tuning", "memory", "context_length", "min_context", "config_sha256", "model_dtype", "bos_token_id",
    )  # fmt: skip
    fields: Any = {name: _get(given, name, kinds.get(name, str)) for name in _names(DomainInfo) if name not in apart}
    return DomainInfo(
        **fields,
        indexes=_strings(given, "indexes"),
        tuning=None if tuning is None else _tuning(tuning),
        memory=None if memory is None else _memory(memory),
        context_length=_get(given, "context_length", int, None),
        min_context=_get(given, "min_context", int, None),
        config_sha256=_get(given, "config_sha256", str, None),
        model_dtype=_get(given, "model_dtype", str, None),
        bos_token_id=_get(given, "bos_token_id", int, None),
    )


def _tuning(given: Json) -> Tuning:
    """The fields after `documents` are optional: services made before there were any leave them out."""
    return Tuning(
        temperature=_get(given, "temperature", float),
        lmbda=_get(given, "lambda", float),
        k=_get(given, "k", int),
        lm_perplexity=_get(given, "lm_perplexity", float),
        knn_perplexity=_get(given, "knn_perplexity", float),
        tokens=_get(given, "tokens", int),
        documents=_get(given, "documents", int),
        rule=_get(given, "rule", str, Tuning.rule),
        parameters={
            name: tuple(value) if isinstance(value, list) else value
            for name, value in _get(given, "parameters", dict, {}).items()
        },
        search=search_options_from_json(_get(given, "search", dict, {})),
        index=_get(given, "index", str, None),
        quality=[
            SearchQuality(
                name=_get(row, "name", str),
                search=search_options_from_json(_get(row, "search", dict, {})),
                perplexity=_get(row, "perplexity", float),
                queries_per_second=_get(row, "queries_per_second", float, None),
                chosen=_get(row, "chosen", bool, False),
            )
            for row in _get(given, "quality", list, [])
        ],
    )


def _memory(given: Json) -> Memory:
    return Memory(
        index=_get(given, "index", str),
        index_bytes=_get(given, "index_bytes", int),
        keys=_get(given, "keys", str),
        keys_bytes=_get(given, "keys_bytes", int),
    )


def _passage_to_json(passage: Passage, encoding: str, budget: ListBudget) -> dict[str, object]:
    arrays = {
        "before": array_to_json(passage.before, encoding, budget),
        "after": array_to_json(passage.after, encoding, budget),
    }
    return {**vars(passage), **arrays}


def _passage_from_json(given: Json) -> Passage:
    return Passage(
        document=_get(given, "document", str),
        entry=_get(given, "entry", int),
        position=_get(given, "position", int),
        before=_required(given, "before", INT32, 1),
        after=_required(given, "after", INT32, 1),
    )


def _names(cls: type[ModelInfo] | type[DomainInfo]) -> list[str]:
    return list(cls.__dataclass_fields__)


_REQUIRED: Any = object()  # no value of a field


def _get(given: Json, name: str, kind: type, default: Any = _REQUIRED) -> Any:  # Any: checked against `kind`
    value = given.get(name, _REQUIRED)
    if value is _REQUIRED or (value is None and default is not _REQUIRED):
        if default is _REQUIRED:
            raise InvalidRequest(f"{name} is required", param=name)
        return default
    number = kind is float and isinstance(value, int) and not isinstance(value, bool)
    if not (isinstance(value, kind) or number) or (kind is int and isinstance(value, bool)):
        raise InvalidRequest(f"{name} must be {kind.__name__}, got {value!r:.60}", param=name)
    return value


def _strings(given: Json, name: str) -> list[str]:
    """Empty when it is left out."""
    values: list[str] = _get(given, name, list, [])
    for value in values:
        if not isinstance(value, str):
            raise InvalidRequest(f"{name} must hold texts, got {value!r:.60}", param=name)
    return values


def _arrays(given: Json, name: str) -> Sequence[Array]:
    return [array_from_json(part, name, INT32, 1) for part in _get(given, name, list)]


def _optional(given: Json, name: str, dtypes: Sequence[str], ndim: int) -> Array | None:
    value = given.get(name)
    return None if value is None else array_from_json(value, name, dtypes, ndim)


def _required(given: Json, name: str, dtypes: Sequence[str], ndim: int) -> Array:
    array = _optional(given, name, dtypes, ndim)
    if array is None:
        raise InvalidRequest(f"{name} is required", param=name)
    return array


def _array(array: Array | None, encoding: str, budget: ListBudget) -> object:
    return None if array is None else array_to_json(array, encoding, budget)
