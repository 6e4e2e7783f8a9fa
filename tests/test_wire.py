"""What is written can be read and is the same, and what is malformed names its field: over generated messages."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from knnlm.errors import InvalidRequest
from knnlm.messages import (
    Document,
    DomainChange,
    DomainInfo,
    ForwardRequest,
    ForwardResult,
    Memory,
    ModelInfo,
    Passage,
    PassagesRequest,
    PassagesResult,
    SearchRequest,
    SearchResult,
    TrainedMemory,
)
from knnlm.neighbors import Neighbors
from knnlm.options import SearchOptions
from knnlm.tuning_records import RuleQuality, SearchQuality, Tuning
from knnlm.v1 import common_pb2, datastore_pb2, lm_pb2
from knnlm.wire import array_to_tensor, jsonable, protos
from knnlm.wire.protos import from_proto, to_proto
from knnlm.wire.records import Record, fields_of
from tests.searching import search

QUICK = settings(max_examples=25, deadline=None)
ENCODINGS = ("list", "base64")


def same(left: Any, right: Any) -> bool:
    """Equal, arrays by dtype and content (NaN equals NaN), sequences of any kind by their elements."""
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right, equal_nan=left.dtype.kind == "f")
    if is_dataclass(left):
        names = [field.name for field in fields(left)]
        return type(left) is type(right) and all(same(getattr(left, n), getattr(right, n)) for n in names)
    if isinstance(left, Sequence) and not isinstance(left, str):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def through_json(value: object) -> Any:
    return json.loads(json.dumps(value, allow_nan=False))


def of(dtype: str, ndim: int, *, least: int = 0) -> st.SearchStrategy[npt.NDArray[Any]]:
    shape = arrays.array_shapes(min_dims=ndim, max_dims=ndim, min_side=least, max_side=5)
    return arrays.arrays(np.dtype(dtype), shape)


def tensor(**changed: Any) -> common_pb2.Tensor:
    return common_pb2.Tensor(**{"dtype": common_pb2.DTYPE_INT32, "shape": [2], "data": b"\0" * 8, **changed})


TOKENS = arrays.arrays(np.int32, st.integers(1, 5))
INT = st.integers(0, 2**31 - 1)
COUNT = st.integers(1, 2**31 - 1)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(max_size=8)
TIMINGS = st.dictionaries(st.sampled_from(["queue", "forward"]), st.floats(0, 10))


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


FORWARD_REQUESTS = st.lists(st.tuples(TOKENS, TOKENS), max_size=3).flatmap(
    lambda pairs: st.builds(
        ForwardRequest,
        st.just([tokens for tokens, _ in pairs]),
        st.just([positions for _, positions in pairs]),
        full=st.booleans(),
        targets=maybe(TOKENS),
        top_n=INT,
        keys=st.booleans(),
        statistics=st.booleans(),
        candidates=maybe(st.lists(TOKENS, min_size=n, max_size=n))
        if (n := sum(len(p) for _, p in pairs))
        else st.none(),
        temperatures=maybe(of("float32", 1)),
        cache=st.booleans(),
    )
)
FORWARD_RESULTS = st.builds(
    ForwardResult,
    log_probs=maybe(of("float32", 2, least=1)),
    target_log_probs=maybe(of("float32", 1)),
    top_tokens=maybe(of("int32", 2, least=1)),
    top_log_probs=maybe(of("float32", 2, least=1)),
    keys=maybe(of("float32", 2, least=1)),
    entropy=maybe(of("float32", 1)),
    largest_log_prob=maybe(of("float32", 1)),
    candidate_log_probs=maybe(of("float32", 1)),
    log_power_sums=maybe(of("float32", 1)),
    timings=TIMINGS,
)
SEARCH_REQUESTS = st.builds(
    SearchRequest,
    TEXT,
    of("float32", 2, least=1),
    st.builds(
        SearchOptions,
        COUNT,
        nprobe=maybe(COUNT),
        ef_search=maybe(COUNT),
        overfetch=maybe(st.floats(1, 100, width=32)),
        rescore=maybe(st.booleans()),
        exclude_own_documents=st.booleans(),
        exclude_documents=st.lists(TEXT, max_size=3).map(tuple),
    ),
    version=maybe(TEXT),
    ids=st.booleans(),
    passages=INT,
    passage_tokens=INT,
    exclude_entries=maybe(of("int64", 1)),
)
SEARCH_OPTIONS = st.builds(SearchOptions, nprobe=maybe(COUNT), overfetch=maybe(st.floats(1, 100, width=32)))
TUNING = st.builds(
    Tuning, FINITE, FINITE, INT, FINITE, FINITE, INT, INT,
    rule=st.sampled_from(["fixed", "other"]),
    parameters=st.dictionaries(TEXT, FINITE | st.lists(FINITE, max_size=3).map(tuple), max_size=2),
    search=SEARCH_OPTIONS,
    index=maybe(TEXT),
    quality=st.lists(st.builds(SearchQuality, TEXT, SEARCH_OPTIONS, FINITE, maybe(FINITE), st.booleans()), max_size=2),
    cache=st.dictionaries(TEXT, FINITE, max_size=2),
    rules=st.lists(st.builds(RuleQuality, TEXT, FINITE, FINITE, FINITE, FINITE, st.booleans()), max_size=2),
)  # fmt: skip
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4))
NEIGHBORS = SHAPES.flatmap(
    lambda shape: st.builds(
        Neighbors,
        arrays.arrays(np.float32, shape),
        arrays.arrays(np.int32, shape),
        maybe(arrays.arrays(np.int64, shape)),
    )
)
PASSAGES = st.lists(st.lists(st.builds(Passage, TEXT, INT, INT, TOKENS, TOKENS), max_size=2), max_size=2)
SEARCH_RESULTS = st.builds(SearchResult, TEXT, TEXT, NEIGHBORS, PASSAGES, TIMINGS)
MODELS = st.builds(
    ModelInfo,
    *[TEXT] * 5, INT, INT, TEXT, INT, TEXT, TEXT, maybe(INT), maybe(INT),
    maybe(st.builds(TrainedMemory, TEXT, TEXT, TEXT, st.integers(0, 2**40), st.floats(0, 1), st.floats(0, 1))),
)  # fmt: skip
DOMAINS = st.builds(
    DomainInfo,
    TEXT, TEXT, st.lists(TEXT, max_size=3), TEXT, INT, INT, INT, *[TEXT] * 6,
    maybe(TUNING),
    st.lists(TEXT, max_size=3),
    maybe(st.builds(Memory, TEXT, st.integers(0, 2**40), TEXT, st.integers(0, 2**40))),
    maybe(INT), maybe(INT), maybe(TEXT), maybe(TEXT), maybe(INT), maybe(TEXT),
)  # fmt: skip


@QUICK
@given(FORWARD_REQUESTS)
def test_forward_requests_survive(request: ForwardRequest) -> None:
    message = lm_pb2.ForwardRequest.FromString(protos.forward_request_to_proto(request).SerializeToString())
    assert same(protos.forward_request_from_proto(message), request)
    for encoding in ENCODINGS:
        body = through_json(jsonable.to_json(request, encoding))
        assert same(jsonable.from_json(ForwardRequest, body), request)


@QUICK
@given(FORWARD_RESULTS)
def test_forward_results_survive(result: ForwardResult) -> None:
    message = lm_pb2.ForwardResponse.FromString(to_proto(result, lm_pb2.ForwardResponse).SerializeToString())
    assert same(from_proto(ForwardResult, message), result)
    for encoding in ENCODINGS:
        body = through_json(jsonable.to_json(result, encoding))
        assert same(jsonable.from_json(ForwardResult, body), result)


@QUICK
@given(SEARCH_REQUESTS)
def test_search_requests_survive(request: SearchRequest) -> None:
    message = datastore_pb2.SearchRequest.FromString(to_proto(request, datastore_pb2.SearchRequest).SerializeToString())
    assert same(from_proto(SearchRequest, message), request)
    for encoding in ENCODINGS:
        body = through_json(jsonable.to_json(request, encoding))
        assert same(jsonable.from_json(SearchRequest, body), request)


@QUICK
@given(SEARCH_RESULTS)
def test_search_results_survive(result: SearchResult) -> None:
    message = datastore_pb2.SearchResponse.FromString(
        to_proto(result, datastore_pb2.SearchResponse).SerializeToString()
    )
    assert same(from_proto(SearchResult, message), result)
    for encoding in ENCODINGS:
        body = through_json(jsonable.to_json(result, encoding))
        assert same(jsonable.from_json(SearchResult, body), result)


@QUICK
@given(MODELS)
def test_models_survive(info: ModelInfo) -> None:
    assert from_proto(ModelInfo, to_proto(info, lm_pb2.GetModelResponse)) == info
    assert jsonable.from_json(ModelInfo, through_json(jsonable.to_json(info))) == info


@QUICK
@given(DOMAINS)
def test_domains_survive(info: DomainInfo) -> None:
    assert same(from_proto(DomainInfo, to_proto(info, datastore_pb2.Domain)), info)
    assert same(jsonable.from_json(DomainInfo, through_json(jsonable.to_json(info))), info)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (DomainInfo, datastore_pb2.Domain), (Tuning, datastore_pb2.Tuning), (Memory, datastore_pb2.Memory),
        (SearchQuality, datastore_pb2.SearchQuality), (SearchOptions, datastore_pb2.SearchOptions),
        (SearchRequest, datastore_pb2.SearchRequest), (SearchResult, datastore_pb2.SearchResponse),
        (Passage, datastore_pb2.Passage), (Document, datastore_pb2.Document),
        (PassagesRequest, datastore_pb2.GetPassagesRequest), (PassagesResult, datastore_pb2.GetPassagesResponse),
        (DomainChange, datastore_pb2.DomainChange), (ForwardResult, lm_pb2.ForwardResponse),
    ],
)  # fmt: skip
def test_a_record_and_its_message_have_the_same_fields(record: type, message: type[Message]) -> None:
    assert set(wire_names(record)) == set(message.DESCRIPTOR.fields_by_name)


def wire_names(record: type) -> Iterator[str]:
    for field in fields_of(record):
        if field.inlined and isinstance(field.kind, Record):
            yield from wire_names(field.kind.type)
        else:
            yield field.wire


def test_a_model_and_its_message_have_the_same_fields() -> None:
    """The message has the tokenizer and its chat template besides."""
    assert {*wire_names(ModelInfo), "tokenizer_json", "chat_template"} == set(
        lm_pb2.GetModelResponse.DESCRIPTOR.fields_by_name
    )


def test_lambda_is_called_lambda_on_the_wire() -> None:
    tuning = Tuning(10.0, 0.25, 64, 20.0, 15.0, 1000, 10)
    info = DomainInfo("d", "v1", ["v1"], "ready", 1, 1, 1, "float16", "f", "flat", "m", "w", "t", tuning)
    body = through_json(jsonable.to_json(info))
    assert body["tuning"]["lambda"] == 0.25
    assert "lmbda" not in body["tuning"]


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"lengths": [1, 2]}, "position_counts"),
        ({"lengths": [5]}, "lengths"),
        ({"lengths": [3], "position_counts": [2]}, "position_counts"),
        ({"lengths": [-1]}, "lengths"),
        ({"lengths": [0] * 4, "position_counts": [0] * 4}, "tokens"),
        ({"tokens": None}, "tokens"),
        ({"positions": None}, "positions"),
        ({"targets": tensor(shape=[9])}, "targets"),
        ({"candidates": tensor()}, "candidates"),
        ({"candidates": tensor(), "candidate_counts": [1]}, "candidate_counts"),
        ({"candidates": tensor(), "candidate_counts": [-2]}, "candidate_counts"),
        ({"candidates": tensor(shape=[9]), "candidate_counts": [9]}, "candidates"),
        ({"temperatures": tensor()}, "temperatures"),
    ],
)
def test_a_forward_request_that_does_not_add_up_is_refused(changed: dict[str, Any], param: str) -> None:
    ids = array_to_tensor(np.arange(3, dtype=np.int32))
    one = array_to_tensor(np.zeros(1, np.int32))
    parts = {"tokens": ids, "lengths": [3], "positions": one, "position_counts": [1], **changed}
    with pytest.raises(InvalidRequest) as refused:
        protos.forward_request_from_proto(lm_pb2.ForwardRequest(**parts))
    assert refused.value.param == param


@pytest.mark.parametrize("param", ["k", "ef_search"])
def test_a_number_that_protobuf_cannot_hold_is_refused_by_name(param: str) -> None:
    request = search("d", np.zeros((1, 2), np.float32), **{"k": 4, param: 2**40})
    with pytest.raises(InvalidRequest) as refused:
        to_proto(request, datastore_pb2.SearchRequest)
    assert refused.value.param == param


def test_an_excluded_entry_of_another_kind_is_refused_by_name() -> None:
    message = to_proto(search("d", np.zeros((1, 2), np.float32), k=1), datastore_pb2.SearchRequest)
    for malformed in (tensor(), array_to_tensor(np.zeros((1, 1), np.int64))):
        message.exclude_entries.CopyFrom(malformed)
        with pytest.raises(InvalidRequest) as refused:
            from_proto(SearchRequest, message)
        assert refused.value.param == "exclude_entries"


@pytest.mark.parametrize(
    ("changed", "param"),
    [({"k": "4"}, "k"), ({"k": True}, "k"), ({"k": None}, "k"), ({"ids": 1}, "ids"), ({"queries": None}, "queries"),
     ({"version": 2}, "version"), ({"overfetch": "2"}, "overfetch"), ({"ef_search": 1.5}, "ef_search"),
     ({"exclude_entries": [1.5]}, "exclude_entries"), ({"exclude_entries": "all"}, "exclude_entries"),
     ({"exclude_own_documents": 1}, "exclude_own_documents"), ({"exclude_documents": "d"}, "exclude_documents"),
     ({"exclude_documents": ["d", 3]}, "exclude_documents"), ({"exclude_documents": [None]}, "exclude_documents")],
)  # fmt: skip
def test_a_field_of_a_wrong_type_is_refused_by_name(changed: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        jsonable.from_json(SearchRequest, {"domain": "d", "queries": [[0.0]], "k": 4, **changed})
    assert refused.value.param == param
