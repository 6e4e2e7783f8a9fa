"""The records of knnlm/messages.py as dicts that JSON can hold, and back.

Names are those of the records, but `lmbda` is "lambda". Arrays are written in one encoding per record, and read in
either; see arrays.py.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from knnlm.errors import InvalidRequest
from knnlm.wire.arrays import ListBudget, array_from_json, array_to_json
from knnlm.wire.records import (
    Array,
    Either,
    Kind,
    List,
    Map,
    Nullable,
    Numbers,
    Record,
    Scalar,
    absent,
    fields_of,
    values_of,
)

Made = TypeVar("Made")


def finite(value: float) -> float | None:
    """The number, None in place of an infinity, which JSON cannot say."""
    return value if math.isfinite(value) else None


def to_json(record: object, encoding: str = "list") -> dict[str, Any]:  # Any: JSON
    """encoding: of its arrays, "list" or "base64". Raises TooLarge for lists of too many numbers."""
    budget = ListBudget()

    def written(value: Any) -> Any:  # Any: what a record holds, and its JSON
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, np.ndarray):
            return array_to_json(value, encoding, budget)
        if isinstance(value, Mapping):
            return {name: written(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [written(item) for item in value]
        return {name: written(item) for name, item in values_of(value)}

    return {name: written(value) for name, value in values_of(record)}


def from_json(record: type[Made], given: Mapping[str, Any]) -> Made:  # Any: what json.loads gives
    """The record. Fields that it does not have are passed over: those who take requests refuse them.

    Raises InvalidRequest naming the field that is missing or holds something else.
    """
    values: dict[str, Any] = {}  # Any: of the fields' types
    for field in fields_of(record):
        value = given if field.inlined else given.get(field.wire)
        values |= absent(field) if value is None else {field.name: _read(value, field.kind, field.wire)}
    return record(**values)


def _read(value: Any, kind: Kind, name: str) -> Any:  # Any: JSON, and what a record holds
    match kind:
        case Scalar(type=expected):
            return value if expected is float and type(value) is int else _checked(value, expected, name)
        case Array(dtypes=dtypes, ndim=ndim):
            return array_from_json(value, name, dtypes, ndim)
        case List(item=item, made=made):
            values = value if isinstance(value, tuple) else _checked(value, list, name)
            return made([_read(v, item, name) for v in values])
        case Numbers():
            if type(value) in (int, float):
                return value
            return tuple(_read(v, Scalar(float), name) for v in _checked(value, list, name))
        case Map(item=item):
            return {key: _read(v, item, name) for key, v in _checked(value, dict, name).items()}
        case Either(types=types):
            return _checked(value, next((t for t in types if type(value) is t), types[0]), name)
        case Nullable(item=item):
            return None if value is None else _read(value, item, name)
        case Record(type=record):
            return from_json(record, _checked(value, dict, name))


def _checked(value: Any, expected: type, name: str) -> Any:  # Any: JSON
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise InvalidRequest(f"{name} must be {expected.__name__}, got {value!r:.60}", param=name)
    return value
