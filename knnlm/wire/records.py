"""What the records of knnlm/messages.py are made of, read once from their type hints.

jsonable.py and protos.py write and read records by it, and the services describe their JSON by it: a new field of a
record travels over every face once the .proto has it.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np

from knnlm.errors import InvalidRequest
from knnlm.options import SearchOptions
from knnlm.wire.arrays import FLOATS, INT32, INT64

WIRE_NAMES = {"lmbda": "lambda"}
INLINED = {"options", "neighbors"}  # records whose fields stand among those of the record that holds them
MATRICES = {  # else vectors
    "log_probs", "top_tokens", "top_log_probs", "keys", "queries", "distances", "values", "ids", "follow",
}  # fmt: skip
SCALARS = (bool, int, float, str)
DTYPES = {np.int32: INT32, np.int64: INT64, np.float32: FLOATS[:1], np.floating: FLOATS}


@dataclass(frozen=True)
class Scalar:
    """One of SCALARS."""

    type: type


@dataclass(frozen=True)
class Array:
    """dtypes: those that are taken; the first is the usual one."""

    dtypes: tuple[str, ...]
    ndim: int


@dataclass(frozen=True)
class List:
    """made: list or tuple."""

    item: "Kind"
    made: type


@dataclass(frozen=True)
class Numbers:
    """One number, or a tuple of them."""


@dataclass(frozen=True)
class Map:
    """Values by their names."""

    item: "Kind"


@dataclass(frozen=True)
class Either:
    """A value of one of several types of Scalar."""

    types: tuple[type, ...]


@dataclass(frozen=True)
class Nullable:
    """A value in a list, or None."""

    item: "Kind"


@dataclass(frozen=True)
class Record:
    type: type


Kind: TypeAlias = Scalar | Array | List | Numbers | Map | Either | Nullable | Record


@dataclass(frozen=True)
class Field:
    """name: in the record; wire: in messages and JSON. required: has no default. nullable: may be None."""

    name: str
    wire: str
    kind: Kind
    required: bool
    nullable: bool
    inlined: bool


def fields_of(record: type) -> tuple[Field, ...]:
    """The fields of a dataclass, in its order."""
    return _fields_of(record)  # apart from it: mypy takes a generic type for one that cannot be hashed


@cache
def _fields_of(record: type) -> tuple[Field, ...]:
    hints = typing.get_type_hints(record)
    return tuple(
        Field(
            name=f.name,
            wire=WIRE_NAMES.get(f.name, f.name),
            kind=_kind(_without_none(hints[f.name]), f.name),
            required=f.default is f.default_factory is dataclasses.MISSING,
            nullable=_without_none(hints[f.name]) is not hints[f.name],
            inlined=f.name in INLINED and isinstance(_kind(_without_none(hints[f.name]), f.name), Record),
        )
        for f in dataclasses.fields(record)
    )


def values_of(record: Any) -> Iterator[tuple[str, Any]]:  # Any: a dataclass instance, and its values
    """Name on the wire and value of every field; of search options those that are asked for. Arrays are as they are
    sent: of another precision than is taken, they are converted."""
    if isinstance(record, SearchOptions):
        yield from record.asked().items()
        return
    for field in fields_of(type(record)):
        value = getattr(record, field.name)
        if field.inlined:
            yield from values_of(value)
        elif isinstance(field.kind, Array) and value is not None:
            yield field.wire, _sendable(value, field.kind)
        else:
            yield field.wire, value


def absent(field: Field) -> dict[str, Any]:  # Any: None
    """The arguments that stand for a field which was not sent: none where the record has a default.

    Raises InvalidRequest for one that is required.
    """
    if not field.required:
        return {}
    if not field.nullable:
        raise InvalidRequest(f"{field.wire} is required", param=field.wire)
    return {field.name: None}


def _sendable(array: Any, kind: Array) -> Any:  # Any: numpy arrays of any dtype
    taken = _dtypes(kind.dtypes)
    return array if array.dtype in taken or array.dtype.kind != taken[0].kind else array.astype(taken[0])


@cache
def _dtypes(names: tuple[str, ...]) -> tuple[np.dtype[Any], ...]:  # Any: of the names
    return tuple(np.dtype(name) for name in names)


def _kind(hint: Any, name: str) -> Kind:  # Any: a type hint
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is np.ndarray:
        (scalar,) = typing.get_args(args[1])
        return Array(tuple(DTYPES[scalar]), 2 if name in MATRICES else 1)
    if origin in (Sequence, list):
        return List(_kind(args[0], name), list)
    if origin is tuple:
        return List(_kind(args[0], name), tuple)
    if origin is Mapping:
        return Map(_kind(args[1], name))
    if type(None) in args:
        return Nullable(_kind(_without_none(hint), name))
    if origin in (typing.Union, types.UnionType):
        return Either(args) if all(arg in SCALARS for arg in args) else Numbers()
    return Scalar(hint) if hint in SCALARS else Record(hint)


def _without_none(hint: Any) -> Any:  # Any: a type hint; the same object where None is not among its types
    args = typing.get_args(hint)
    if type(None) not in args:
        return hint
    return typing.Union[tuple(arg for arg in args if arg is not type(None))]  # noqa: UP007  of a computed tuple
