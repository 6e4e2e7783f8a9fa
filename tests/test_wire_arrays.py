"""One array as bytes and as JSON: what is written can be read and is the same, what is malformed names its field."""

import base64
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.errors import InvalidRequest, TooLarge
from knnlm.messages import (
    ForwardResult,
)
from knnlm.v1 import common_pb2
from knnlm.wire import array_from_json, array_from_tensor, array_to_json, array_to_tensor, jsonable
from knnlm.wire.arrays import FLOATS, INT32, LIST_LIMIT
from tests.test_wire import QUICK, of, same, tensor, through_json


@QUICK
@given(st.sampled_from(["float32", "float16", "int32", "int64"]).flatmap(lambda d: of(d, 2)))
def test_packed_arrays_survive_with_dtype_and_shape(array: npt.NDArray[Any]) -> None:
    dtypes = (array.dtype.name,)
    assert same(array_from_tensor(array_to_tensor(array), "a", dtypes, 2), array)
    assert same(array_from_json(through_json(array_to_json(array, "base64")), "a", dtypes, 2), array)
    turned = np.asfortranarray(array)
    assert same(array_from_tensor(array_to_tensor(turned), "a", dtypes, 2), array)


@QUICK
@given(st.sampled_from(["float32", "int32", "int64"]).flatmap(lambda d: of(d, 2, least=1)))
def test_lists_survive_with_every_float_there_is(array: npt.NDArray[Any]) -> None:
    assert same(array_from_json(through_json(array_to_json(array, "list")), "a", (array.dtype.name,), 2), array)


def test_packed_bytes_are_little_endian() -> None:
    big = np.array([1, 2], ">i4")
    assert array_to_tensor(big).data == b"\x01\0\0\0\x02\0\0\0"
    assert array_from_tensor(array_to_tensor(big), "a", INT32, 1).tolist() == [1, 2]


@pytest.mark.parametrize(
    "malformed",
    [
        tensor(data=b"\0" * 7),
        tensor(data=b""),
        tensor(shape=[3]),
        tensor(shape=[-2]),
        tensor(shape=[2, 1]),
        tensor(shape=[]),
        tensor(shape=[2**62]),
        tensor(shape=[2**40], data=b""),
        tensor(dtype=common_pb2.DTYPE_FLOAT32),
        tensor(dtype=common_pb2.DTYPE_UNSPECIFIED),
        tensor(dtype=99),
        common_pb2.Tensor(),
    ],
)
def test_a_malformed_tensor_is_refused_by_name(malformed: common_pb2.Tensor) -> None:
    with pytest.raises(InvalidRequest, match="tokens") as refused:
        array_from_tensor(malformed, "tokens", INT32, 1)
    assert refused.value.param == "tokens"


def packed(**changed: object) -> dict[str, object]:
    return {"dtype": "int32", "shape": [2], "data": base64.b64encode(b"\0" * 8).decode(), **changed}


@pytest.mark.parametrize(
    "malformed",
    [
        None, 3, "x", True, {}, [[1], [2]], [1, [2]], [1.5], ["1"], [None], [{}], [True], [2**31], [-(2**31) - 1],
        [2**70], [1, "NaN"], packed(extra=1), packed(data="%%"), packed(data="é"), packed(data=3),
        packed(shape=[3]), packed(shape="2"), packed(shape=[2.0]), packed(shape=[True]), packed(shape=[-1]),
        packed(shape=[[2]]), packed(dtype="float32"), packed(dtype="object"), packed(dtype=["int32"]),
    ],
)  # fmt: skip
def test_a_malformed_array_in_json_is_refused_by_name(malformed: object) -> None:
    with pytest.raises(InvalidRequest, match="tokens") as refused:
        array_from_json(malformed, "tokens", INT32, 1)
    assert refused.value.param == "tokens"


def test_nothing_is_nothing_at_any_level() -> None:
    assert array_from_json([[]], "tokens", INT32, 1).shape == (0,)


@pytest.mark.parametrize("malformed", [[["nan"]], [["1.5"]], [[True, "NaN"]], [[1], [1, 2]], [[[1]]], [[None]], [[{}]]])
def test_malformed_rows_are_refused(malformed: object) -> None:
    with pytest.raises(InvalidRequest, match="queries"):
        array_from_json(malformed, "queries", FLOATS, 2)


@pytest.mark.parametrize("shape", [[0, 2**70], [0, 2**31], [2**40, 0]])
def test_a_shape_of_nothing_cannot_be_absurd(shape: list[int]) -> None:
    with pytest.raises(InvalidRequest, match="queries"):
        array_from_json({"dtype": "float32", "shape": shape, "data": ""}, "queries", FLOATS, 2)


def test_one_long_text_among_numbers_costs_no_more_than_itself() -> None:
    with pytest.raises(InvalidRequest, match="queries"):  # as an array of texts this would take 400 GB
        array_from_json([["x" * 10**6, *range(10**5)]], "queries", FLOATS, 2)


def test_a_number_too_large_for_float32_is_infinite_for_its_reader_to_refuse() -> None:
    assert array_from_json([[1e300]], "queries", FLOATS, 2).tolist() == [[np.inf]]


def test_a_list_too_long_for_people_must_be_packed() -> None:
    array = np.zeros(LIST_LIMIT + 1, np.int32)
    with pytest.raises(TooLarge, match="base64"):
        array_to_json(array, "list")
    assert isinstance(array_to_json(array, "base64"), dict)


def test_the_lists_of_one_answer_are_counted_together() -> None:
    half = np.zeros((1, LIST_LIMIT // 2 + 1), np.float32)
    with pytest.raises(TooLarge, match="base64"):
        jsonable.to_json(ForwardResult(log_probs=half, keys=half), "list")
    jsonable.to_json(ForwardResult(log_probs=half), "list")
    jsonable.to_json(ForwardResult(log_probs=half, keys=half), "base64")


def test_an_encoding_is_one_of_two() -> None:
    with pytest.raises(InvalidRequest, match="encoding"):
        array_to_json(np.zeros(1, np.int32), "hex")


def test_a_dtype_that_does_not_travel_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="float64"):
        array_to_tensor(np.zeros(1))
