"""The messages of knnlm/messages.py as protobuf messages of knnlm/v1, and back."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message

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
from knnlm.v1 import common_pb2, datastore_pb2, lm_pb2
from knnlm.wire.arrays import FLOATS, INT32, INT64, Array, array_from_tensor, array_to_tensor

__all__ = [
    "domain_from_proto", "domain_to_proto", "forward_request_from_proto", "forward_request_to_proto",
    "forward_result_from_proto", "forward_result_to_proto", "model_from_proto", "model_to_proto",
    "not_unicode", "packed",
    "search_request_from_proto", "search_request_to_proto", "search_result_from_proto", "search_result_to_proto",
]  # fmt: skip

Sent = TypeVar("Sent", bound=Message)


def forward_request_to_proto(request: ForwardRequest) -> lm_pb2.ForwardRequest:
    return lm_pb2.ForwardRequest(
        tokens=array_to_tensor(_joined(request.tokens)),
        lengths=[len(tokens) for tokens in request.tokens],
        positions=array_to_tensor(_joined(request.positions)),
        position_counts=[len(positions) for positions in request.positions],
        full=request.full,
        targets=None if request.targets is None else array_to_tensor(request.targets.astype(np.int32, copy=False)),
        top_n=_int32(request.top_n, "top_n"),
        keys=request.keys,
        statistics=request.statistics,
    )


def forward_request_from_proto(message: lm_pb2.ForwardRequest) -> ForwardRequest:
    if len(message.position_counts) != len(message.lengths):
        raise InvalidRequest(
            f"position_counts must be as many as lengths, {len(message.lengths)}, got {len(message.position_counts)}",
            param="position_counts",
        )
    tokens = _required(message, "tokens", INT32, 1)
    if len(message.lengths) > len(tokens):  # before as many arrays are made
        raise InvalidRequest(
            f"{len(message.lengths)} sequences of {len(tokens)} tokens together: each must have at least one",
            param="tokens",
        )
    return ForwardRequest(
        tokens=_split(tokens, message.lengths, "tokens", "lengths"),
        positions=_split(
            _required(message, "positions", INT32, 1), message.position_counts, "positions", "position_counts"
        ),
        full=message.full,
        targets=_optional(message, "targets", INT32, 1),
        top_n=message.top_n,
        keys=message.keys,
        statistics=message.statistics,
    )


def forward_result_to_proto(result: ForwardResult) -> lm_pb2.ForwardResponse:
    return lm_pb2.ForwardResponse(
        log_probs=_tensor(result.log_probs),
        target_log_probs=_tensor(result.target_log_probs),
        top_tokens=_tensor(result.top_tokens),
        top_log_probs=_tensor(result.top_log_probs),
        keys=_tensor(result.keys),
        entropy=_tensor(result.entropy),
        largest_log_prob=_tensor(result.largest_log_prob),
        fingerprint=result.fingerprint,
        timings=_timings(result.timings),
    )


def forward_result_from_proto(message: lm_pb2.ForwardResponse) -> ForwardResult:
    return ForwardResult(
        log_probs=_optional(message, "log_probs", FLOATS[:1], 2),
        target_log_probs=_optional(message, "target_log_probs", FLOATS[:1], 1),
        top_tokens=_optional(message, "top_tokens", INT32, 2),
        top_log_probs=_optional(message, "top_log_probs", FLOATS[:1], 2),
        keys=_optional(message, "keys", FLOATS, 2),
        entropy=_optional(message, "entropy", FLOATS[:1], 1),
        largest_log_prob=_optional(message, "largest_log_prob", FLOATS[:1], 1),
        fingerprint=message.fingerprint,
        timings=_seconds(message.timings),
    )


def model_to_proto(info: ModelInfo, tokenizer_json: str = "") -> lm_pb2.GetModelResponse:
    return lm_pb2.GetModelResponse(**vars(info), tokenizer_json=tokenizer_json)


def model_from_proto(message: lm_pb2.GetModelResponse) -> ModelInfo:
    return ModelInfo(
        model_id=message.model_id,
        architecture=message.architecture,
        weights_sha256=message.weights_sha256,
        tokenizer_sha256=message.tokenizer_sha256,
        config_sha256=message.config_sha256,
        vocab_size=message.vocab_size,
        context_length=message.context_length,
        key_function=message.key_function,
        key_dim=message.key_dim,
        dtype=message.dtype,
        device=message.device,
        bos_token_id=message.bos_token_id if message.HasField("bos_token_id") else None,
        eos_token_id=message.eos_token_id if message.HasField("eos_token_id") else None,
    )


def search_request_to_proto(request: SearchRequest) -> datastore_pb2.SearchRequest:
    queries = request.queries
    return packed(
        datastore_pb2.SearchRequest,
        domain=request.domain,
        queries=array_to_tensor(queries if queries.dtype == np.float16 else queries.astype(np.float32, copy=False)),
        version=request.version,
        ids=request.ids,
        passages=_int32(request.passages, "passages"),
        passage_tokens=_int32(request.passage_tokens, "passage_tokens"),
        exclude_entries=_tensor(request.exclude_entries),
        **_options_to_fields(request.options),
    )


def search_request_from_proto(message: datastore_pb2.SearchRequest) -> SearchRequest:
    return SearchRequest(
        domain=message.domain,
        queries=_required(message, "queries", FLOATS, 2),
        options=_options_from_message(message),
        version=message.version if message.HasField("version") else None,
        ids=message.ids,
        passages=message.passages,
        passage_tokens=message.passage_tokens,
        exclude_entries=_optional(message, "exclude_entries", INT64, 1),
    )


def _options_to_fields(options: SearchOptions) -> dict[str, Any]:  # Any: values of protobuf fields
    """The fields of the same names; what is not asked for is left out."""
    return {name: _int32(v, name) if type(v) is int else v for name, v in options.asked().items()}


def _options_from_message(message: datastore_pb2.SearchRequest | datastore_pb2.SearchOptions) -> SearchOptions:
    """From the fields that have the options' names. A field without presence that is 0 was given as 0."""
    given = {}
    for name in SEARCH_OPTIONS:
        if not message.DESCRIPTOR.fields_by_name[name].has_presence or message.HasField(name):
            value = getattr(message, name)
            given[name] = list(value) if SEARCH_OPTIONS[name].kind is tuple else value
    return SearchOptions.of(given)


def search_result_to_proto(result: SearchResult) -> datastore_pb2.SearchResponse:
    return datastore_pb2.SearchResponse(
        domain=result.domain,
        version=result.version,
        distances=array_to_tensor(result.neighbors.distances),
        values=array_to_tensor(result.neighbors.values),
        ids=_tensor(result.neighbors.ids),
        passages=[
            datastore_pb2.Passages(passages=[_passage_to_proto(passage) for passage in passages])
            for passages in result.passages
        ],
        timings=_timings(result.timings),
    )


def search_result_from_proto(message: datastore_pb2.SearchResponse) -> SearchResult:
    return SearchResult(
        domain=message.domain,
        version=message.version,
        neighbors=Neighbors(
            _required(message, "distances", FLOATS[:1], 2),
            _required(message, "values", INT32, 2),
            _optional(message, "ids", INT64, 2),
        ),
        passages=[[_passage_from_proto(passage) for passage in passages.passages] for passages in message.passages],
        timings=_seconds(message.timings),
    )


def domain_to_proto(info: DomainInfo) -> datastore_pb2.Domain:
    tuning = None if info.tuning is None else _tuning_to_proto(info.tuning)
    memory = None if info.memory is None else datastore_pb2.Memory(**vars(info.memory))
    return datastore_pb2.Domain(**{**vars(info), "tuning": tuning, "memory": memory})


def _tuning_to_proto(tuning: Tuning) -> datastore_pb2.Tuning:
    fields = dict(vars(tuning))
    parameters = {
        name: datastore_pb2.Parameter(number=value)
        if isinstance(value, int | float)
        else datastore_pb2.Parameter(numbers=value)
        for name, value in fields.pop("parameters").items()
    }
    quality = [
        datastore_pb2.SearchQuality(
            **{**vars(row), "search": datastore_pb2.SearchOptions(**_options_to_fields(row.search))}
        )
        for row in fields.pop("quality")
    ]
    search = datastore_pb2.SearchOptions(**_options_to_fields(fields.pop("search")))
    return datastore_pb2.Tuning(
        **{"lambda": fields.pop("lmbda")}, **fields, parameters=parameters, search=search, quality=quality
    )


def _tuning_from_proto(message: datastore_pb2.Tuning) -> Tuning:
    return Tuning(
        temperature=message.temperature,
        lmbda=getattr(message, "lambda"),
        k=message.k,
        lm_perplexity=message.lm_perplexity,
        knn_perplexity=message.knn_perplexity,
        tokens=message.tokens,
        documents=message.documents,
        rule=message.rule or Tuning.rule,
        parameters={
            name: value.number if value.HasField("number") else tuple(value.numbers)
            for name, value in message.parameters.items()
        },
        search=_options_from_message(message.search),
        index=message.index if message.HasField("index") else None,
        quality=[
            SearchQuality(
                name=row.name,
                search=_options_from_message(row.search),
                perplexity=row.perplexity,
                queries_per_second=row.queries_per_second if row.HasField("queries_per_second") else None,
                chosen=row.chosen,
            )
            for row in message.quality
        ],
    )


def domain_from_proto(message: datastore_pb2.Domain) -> DomainInfo:
    memory = None
    if message.HasField("memory"):
        held = message.memory
        memory = Memory(held.index, held.index_bytes, held.keys, held.keys_bytes)
    return DomainInfo(
        domain=message.domain,
        version=message.version,
        versions=list(message.versions),
        state=message.state,
        entries=message.entries,
        documents=message.documents,
        key_dim=message.key_dim,
        key_dtype=message.key_dtype,
        key_function=message.key_function,
        index=message.index,
        model_id=message.model_id,
        weights_sha256=message.weights_sha256,
        tokenizer_sha256=message.tokenizer_sha256,
        tuning=_tuning_from_proto(message.tuning) if message.HasField("tuning") else None,
        indexes=list(message.indexes),
        memory=memory,
        context_length=message.context_length if message.HasField("context_length") else None,
        min_context=message.min_context if message.HasField("min_context") else None,
        config_sha256=message.config_sha256 if message.HasField("config_sha256") else None,
        model_dtype=message.model_dtype if message.HasField("model_dtype") else None,
        bos_token_id=message.bos_token_id if message.HasField("bos_token_id") else None,
    )


def _passage_to_proto(passage: Passage) -> datastore_pb2.Passage:
    return datastore_pb2.Passage(
        document=passage.document,
        entry=passage.entry,
        position=passage.position,
        before=array_to_tensor(passage.before),
        after=array_to_tensor(passage.after),
    )


def _passage_from_proto(message: datastore_pb2.Passage) -> Passage:
    return Passage(
        document=message.document,
        entry=message.entry,
        position=message.position,
        before=_required(message, "before", INT32, 1),
        after=_required(message, "after", INT32, 1),
    )


def packed(kind: type[Sent], **fields: Any) -> Sent:  # Any: what the message takes
    """A message of these fields. Raises InvalidRequest that names the one whose text is not valid Unicode."""
    try:
        return kind(**fields)
    except UnicodeEncodeError as err:
        name = next(
            n
            for n, value in fields.items()
            if value == err.object or (isinstance(value, Sequence) and err.object in value)
        )
        raise not_unicode(name, err) from err


def not_unicode(param: str, err: UnicodeEncodeError) -> InvalidRequest:
    """Half of a surrogate pair, which JSON can carry, has no bytes in UTF-8."""
    return InvalidRequest(f"{param} is not valid Unicode at character {err.start}, got {err.object!r:.80}", param=param)


Carrier = (
    lm_pb2.ForwardRequest
    | lm_pb2.ForwardResponse
    | datastore_pb2.SearchRequest
    | datastore_pb2.SearchResponse
    | datastore_pb2.Passage
)


def _optional(message: Carrier, name: str, dtypes: Sequence[str], ndim: int) -> Array | None:
    if not message.HasField(name):  # a field of every message it is asked of
        return None
    return array_from_tensor(getattr(message, name), name, dtypes, ndim)


def _required(message: Carrier, name: str, dtypes: Sequence[str], ndim: int) -> Array:
    array = _optional(message, name, dtypes, ndim)
    if array is None:
        raise InvalidRequest(f"{name} is required", param=name)
    return array


def _tensor(array: Array | None) -> common_pb2.Tensor | None:
    return None if array is None else array_to_tensor(array)


def _joined(parts: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    return np.concatenate([np.empty(0, np.int32), *parts]).astype(np.int32, copy=False)


def _split(flat: Array, sizes: Sequence[int], name: str, sizes_name: str) -> list[Array]:
    if any(size < 0 for size in sizes) or sum(sizes) != len(flat):
        raise InvalidRequest(
            f"{sizes_name} must be >= 0 and add up to the {len(flat)} of {name}, got a sum of {sum(sizes)}",
            param=sizes_name,
        )
    ends = np.cumsum([0, *sizes])
    return [flat[start:end] for start, end in pairwise(ends)]


def _int32(value: int, name: str) -> int:
    if not -(2**31) <= value < 2**31:
        raise InvalidRequest(f"{name} must be a 32-bit number, got {value}", param=name)
    return value


def _timings(timings: Mapping[str, float]) -> list[common_pb2.Timing]:
    return [common_pb2.Timing(stage=stage, seconds=seconds) for stage, seconds in timings.items()]


def _seconds(timings: Iterable[common_pb2.Timing]) -> dict[str, float]:
    return {timing.stage: timing.seconds for timing in timings}
