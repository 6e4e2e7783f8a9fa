"""One array as a Tensor message or as JSON.

Packed: little-endian, row-major bytes with dtype and shape; in JSON {"dtype", "shape", "data": base64}. JSON also takes
and gives nested lists of numbers, where what JSON has no number for is written as protobuf's JSON mapping does: "NaN",
"Infinity", "-Infinity". Reading checks everything the bytes claim; arrays that are read may be read-only.
"""

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from knnlm.errors import InvalidRequest, TooLarge
from knnlm.v1 import common_pb2

Array = npt.NDArray[Any]  # one of the dtypes in _CODES; which one is checked when it is read

_CODES = {
    "float32": common_pb2.DTYPE_FLOAT32,
    "float16": common_pb2.DTYPE_FLOAT16,
    "int32": common_pb2.DTYPE_INT32,
    "int64": common_pb2.DTYPE_INT64,
}
_NAMES = {code: name for name, code in _CODES.items()}
_LITTLE = {name: np.dtype(name).newbyteorder("<") for name in _CODES}
_OF_DTYPE = {np.dtype(name): name for name in _CODES}  # in this machine's byte order; dtype.name is slow to ask for
FLOATS, INT32, INT64 = ("float32", "float16"), ("int32",), ("int64",)
LIST_LIMIT = 1_000_000  # numbers: ten times larger than packed, and slow for everybody
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def array_to_tensor(array: Array) -> common_pb2.Tensor:
    """array: any shape, of a dtype that can travel."""
    name = _travelling(array)
    return common_pb2.Tensor(dtype=_CODES[name], shape=array.shape, data=_packed(array, name))


def array_from_tensor(tensor: common_pb2.Tensor, name: str, dtypes: Sequence[str], ndim: int) -> Array:
    """The array, of one of `dtypes` (the first is the usual one) and with `ndim` dimensions."""
    return _unpacked(tensor.data, _NAMES.get(tensor.dtype), list(tensor.shape), name, dtypes, ndim)


class ListBudget:
    """The numbers that one answer may still write as lists; all its arrays share it."""

    def __init__(self, numbers: int = LIST_LIMIT) -> None:
        self._all = self._left = numbers

    def spend(self, numbers: int) -> None:
        """Raises TooLarge when the answer would hold more lists of numbers than it may."""
        if numbers > self._left:
            raise TooLarge(
                f'an answer may hold {self._all} numbers as lists, this one has more: ask for encoding "base64"',
                param="encoding",
            )
        self._left -= numbers


def array_to_json(array: Array, encoding: str, budget: ListBudget | None = None) -> object:
    """encoding: "list" or "base64". budget: of the answer that the array is a part of; None: it is all of it.

    Raises TooLarge for lists of more numbers than the budget has left.
    """
    if encoding == "base64":
        name = _travelling(array)
        data = base64.b64encode(_packed(array, name)).decode("ascii")
        return {"dtype": name, "shape": list(array.shape), "data": data}
    if encoding != "list":
        raise InvalidRequest(f'encoding must be "list" or "base64", got {encoding!r}', param="encoding")
    (budget or ListBudget()).spend(array.size)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        words = array.astype(object)
        words[np.isnan(array)], words[np.isposinf(array)], words[np.isneginf(array)] = _WORDS
        return words.tolist()
    return array.tolist()


def array_from_json(value: object, name: str, dtypes: Sequence[str], ndim: int) -> Array:
    """Either form. A list becomes the first of `dtypes`; of several rows all must be equally long."""
    if isinstance(value, Mapping):
        if set(value) != {"dtype", "shape", "data"}:
            raise InvalidRequest(
                f"a packed {name} has the fields dtype, shape and data, got {sorted(value)}", param=name
            )
        return _unpacked(_decoded(value["data"], name), value["dtype"], value["shape"], name, dtypes, ndim)
    if not isinstance(value, list):
        raise InvalidRequest(f"{name} must be a list of numbers or a packed array, got {_short(value)}", param=name)
    return _from_list(value, name, np.dtype(dtypes[0]), ndim)


def _from_list(value: list[Any], name: str, dtype: np.dtype[Any], ndim: int) -> Array:
    # as objects: an array of texts would take, for each of them, the room of the longest
    objects = np.array(value, dtype=object)
    if not objects.size:
        return np.zeros(objects.shape if objects.ndim == ndim else (0,) * ndim, dtype)
    if objects.ndim != ndim:
        raise InvalidRequest(f"{name} must be a list of {ndim} levels, its rows equally long", param=name)
    kinds = set(map(type, objects.ravel()))
    if str in kinds:
        flat = [_WORDS.get(number, number) if isinstance(number, str) else number for number in objects.ravel()]
        objects = np.array(flat, dtype=object).reshape(objects.shape)
        kinds = set(map(type, flat))
    if not kinds <= ({int} if dtype.kind == "i" else {int, float}):
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InvalidRequest(f"{name} must hold numbers of {dtype.name}, got {found}", param=name)
    return _fitted(objects, name, dtype)


def _fitted(objects: Array, name: str, dtype: np.dtype[Any]) -> Array:
    """Checked to be numbers, made an array; what is no number of the dtype is refused, not wrapped."""
    try:
        numbers = objects.astype(np.int64 if dtype.kind == "i" else np.float64)
    except OverflowError as err:
        raise InvalidRequest(f"{name} holds a number that is no {dtype.name}", param=name) from err
    if dtype.kind == "i" and (numbers.min() < np.iinfo(dtype).min or numbers.max() > np.iinfo(dtype).max):
        raise InvalidRequest(f"{name} holds a number that is no {dtype.name}", param=name)
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which those who read it refuse
        return numbers.astype(dtype)


def _unpacked(data: bytes, dtype: object, shape: object, name: str, dtypes: Sequence[str], ndim: int) -> Array:
    if dtype not in dtypes or not isinstance(dtype, str):
        raise InvalidRequest(f"{name} must be {' or '.join(dtypes)}, got {_short(dtype)}", param=name)
    if not isinstance(shape, list) or not all(type(side) is int and 0 <= side < 2**31 for side in shape):
        raise InvalidRequest(f"{name} must have a shape of 32-bit numbers >= 0, got {_short(shape)}", param=name)
    if len(shape) != ndim:
        raise InvalidRequest(f"{name} must have {ndim} dimensions, got shape {_short(shape)}", param=name)
    little = _LITTLE[dtype]
    if math.prod(shape) * little.itemsize != len(data):
        expected = math.prod(shape) * little.itemsize
        raise InvalidRequest(
            f"{name} of shape {shape} and dtype {dtype} takes {expected} bytes, got {len(data)}", param=name
        )
    return np.frombuffer(data, little).reshape(shape).astype(np.dtype(dtype), copy=False)


def _packed(array: Array, name: str) -> bytes:
    return array.astype(_LITTLE[name], copy=False).tobytes()


def _travelling(array: Array) -> str:
    name = _OF_DTYPE.get(array.dtype)
    if name is not None:
        return name
    if array.dtype.name not in _CODES:  # big-endian perhaps
        raise InvalidRequest(f"arrays of {array.dtype.name} cannot be sent, expected one of {', '.join(_CODES)}")
    return array.dtype.name


def _decoded(data: object, name: str) -> bytes:
    if not isinstance(data, str):
        raise InvalidRequest(f"data of {name} must be base64 text, got {_short(data)}", param=name)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as err:  # ValueError: not ASCII
        raise InvalidRequest(f"data of {name} is not base64: {err}", param=name) from err


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
