"""The records of knnlm/messages.py as protobuf messages of knnlm/v1, and back: field by field, by name.

A ForwardRequest alone is written otherwise: its sequences are joined into one array, and so are its candidates.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from knnlm.errors import InvalidRequest, TooLarge
from knnlm.messages import ForwardRequest
from knnlm.v1 import common_pb2, datastore_pb2, lm_pb2
from knnlm.wire.arrays import FLOATS, INT32, array_from_tensor, array_to_tensor
from knnlm.wire.records import Array, Field, Kind, List, Map, Numbers, Record, absent, fields_of, values_of

Sent = TypeVar("Sent", bound=Message)
Made = TypeVar("Made")
Ids = npt.NDArray[np.int32]

MAX_INT32 = 2**31 - 1
MAX_FLOAT32 = float(np.finfo(np.float32).max)


def to_proto(record: object, message: type[Sent], **more: object) -> Sent:
    """The message with the record's fields, and `more`. Raises InvalidRequest naming the field that it cannot hold."""
    writers = _writers(message.DESCRIPTOR)
    sent = {name: writers[name](value) for name, value in values_of(record) if value is not None}
    return new(message, **sent, **more)


def from_proto(record: type[Made], message: Message) -> Made:
    """The record. An empty text that may not have been sent stands for the default. Raises InvalidRequest by name."""
    values: dict[str, Any] = {}  # Any: of the fields' types
    for field, has_presence in _presence(record, message.DESCRIPTOR):  # type: ignore[arg-type]  # every type is hashable
        if field.inlined and isinstance(field.kind, Record):
            values[field.name] = from_proto(field.kind.type, message)
        elif has_presence and not message.HasField(field.wire):
            values |= absent(field)
        else:
            value = _received(getattr(message, field.wire), field.kind, field.wire)
            if has_presence or field.required or not isinstance(value, str) or value:
                values[field.name] = value
    return record(**values)


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
        candidates=None if request.candidates is None else array_to_tensor(_joined(request.candidates)),
        candidate_counts=[len(tokens) for tokens in request.candidates or ()],
        temperatures=None if request.temperatures is None else array_to_tensor(_float32s(request.temperatures)),
        cache=request.cache,
    )


def forward_request_from_proto(message: lm_pb2.ForwardRequest) -> ForwardRequest:
    """Raises InvalidRequest for sequences that do not add up."""
    if len(message.position_counts) != len(message.lengths):
        raise InvalidRequest(
            f"position_counts must be as many as lengths, {len(message.lengths)}, got {len(message.position_counts)}",
            param="position_counts",
        )
    tokens, positions = _required(message, "tokens"), _required(message, "positions")
    if len(message.lengths) > len(tokens):  # before as many arrays are made
        raise InvalidRequest(
            f"{len(message.lengths)} sequences of {len(tokens)} tokens together: each must have at least one",
            param="tokens",
        )
    candidates = None
    if message.HasField("candidates"):
        if len(message.candidate_counts) != len(positions):
            raise InvalidRequest(
                f"candidate_counts must be one per position, {len(positions)}, got {len(message.candidate_counts)}",
                param="candidates",
            )
        flat = _required(message, "candidates")
        candidates = _split(flat, message.candidate_counts, "candidates", "candidate_counts")
    return ForwardRequest(
        tokens=_split(tokens, message.lengths, "tokens", "lengths"),
        positions=_split(positions, message.position_counts, "positions", "position_counts"),
        full=message.full,
        targets=_required(message, "targets") if message.HasField("targets") else None,
        top_n=message.top_n,
        keys=message.keys,
        statistics=message.statistics,
        candidates=candidates,
        temperatures=_required(message, "temperatures", FLOATS[:1]) if message.HasField("temperatures") else None,
        cache=message.cache,
    )


def new(kind: type[Sent], **fields: Any) -> Sent:  # Any: what the message takes
    """A message of these fields. Raises InvalidRequest that names the one whose text is not valid Unicode."""
    try:
        return kind(**fields)
    except UnicodeEncodeError as err:
        texts = {n: [value] if isinstance(value, str) else value for n, value in fields.items()}
        name = next(n for n, value in texts.items() if isinstance(value, Sequence) and err.object in value)
        raise not_unicode(name, err) from err


def not_unicode(param: str, err: UnicodeEncodeError) -> InvalidRequest:
    """Half of a surrogate pair, which JSON can carry, has no bytes in UTF-8."""
    return InvalidRequest(f"{param} is not valid Unicode at character {err.start}, got {err.object!r:.80}", param=param)


@cache
def _presence(record: type, message: Descriptor) -> tuple[tuple[Field, bool], ...]:
    """The record's fields, and whether the message knows if they were sent."""
    described = message.fields_by_name
    return tuple((f, not f.inlined and described[f.wire].has_presence) for f in fields_of(record))


@cache
def _writers(message: Descriptor) -> Mapping[str, Callable[[Any], Any]]:  # Any: of a record, and what the message takes
    """What turns a record's value into that of the message's field, by the field's name."""
    return {field.name: _writer(field) for field in message.fields}


def _writer(field: Any) -> Callable[[Any], Any]:  # Any: a FieldDescriptor; see above
    if field.type == FieldDescriptor.TYPE_INT32:
        return partial(_int32, name=field.name)
    if field.type == FieldDescriptor.TYPE_FLOAT and not field.is_repeated:
        return partial(_float32, name=field.name)
    if field.message_type is None:
        return _unchanged
    message = GetMessageClass(field.message_type)
    if message is common_pb2.Tensor:
        return array_to_tensor
    if message is common_pb2.Timing:
        return lambda timings: [common_pb2.Timing(stage=stage, seconds=s) for stage, s in timings.items()]
    if field.message_type.GetOptions().map_entry:
        return lambda parameters: {name: _parameter(value) for name, value in parameters.items()}
    if field.is_repeated:
        return lambda items: [_element(item, message) for item in items]
    return partial(to_proto, message=message)


def _unchanged(value: Any) -> Any:  # Any: a number, a text, or several
    return value


def _element(item: Any, message: type[Message]) -> Message:  # Any: a record, or a list of them
    if isinstance(item, list | tuple):  # in a message of one field
        ((name, write),) = _writers(message.DESCRIPTOR).items()
        return message(**{name: write(item)})
    return to_proto(item, message)


def _parameter(value: float | Sequence[float]) -> datastore_pb2.Parameter:
    if isinstance(value, int | float):
        return datastore_pb2.Parameter(number=value)
    return datastore_pb2.Parameter(numbers=value)


def _received(value: Any, kind: Kind, name: str) -> Any:  # Any: what a message holds, and what a record does
    match kind:
        case Array(dtypes=dtypes, ndim=ndim):
            return array_from_tensor(value, name, dtypes, ndim)
        case List(item=List(item=item)):
            return [[_received(v, item, name) for v in getattr(row, row.DESCRIPTOR.fields[0].name)] for row in value]
        case List(item=item, made=made):
            return made([_received(v, item, name) for v in value])
        case Map(item=Numbers()):
            return {n: p.number if p.HasField("number") else tuple(p.numbers) for n, p in value.items()}
        case Map():
            return {timing.stage: timing.seconds for timing in value}
        case Record(type=record):
            return from_proto(record, value)
        case _:
            return value


def _required(message: lm_pb2.ForwardRequest, name: str, dtypes: Sequence[str] = INT32) -> npt.NDArray[Any]:
    if not message.HasField(name):
        raise InvalidRequest(f"{name} is required", param=name)
    return array_from_tensor(getattr(message, name), name, dtypes, 1)


def _float32s(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # becomes infinite, which is refused where it is read
        return values.astype(np.float32, copy=False)


def _joined(parts: Sequence[Ids]) -> Ids:
    return np.concatenate([np.empty(0, np.int32), *parts]).astype(np.int32, copy=False)


def _split(flat: Ids, sizes: Sequence[int], name: str, sizes_name: str) -> list[Ids]:
    ends = [0, *accumulate(sizes)]
    if min(sizes, default=0) < 0 or ends[-1] != len(flat):
        raise InvalidRequest(
            f"{sizes_name} must be >= 0 and add up to the {len(flat)} of {name}, got a sum of {ends[-1]}",
            param=sizes_name,
        )
    return [flat[start:end] for start, end in pairwise(ends)]


def _int32(value: int, name: str) -> int:
    if value > MAX_INT32:
        raise TooLarge(f"{name} must be at most {MAX_INT32}, got {value}", param=name)
    if value < -MAX_INT32 - 1:
        raise InvalidRequest(f"{name} must be a 32-bit number, got {value}", param=name)
    return value


def _float32(value: float, name: str) -> float:
    """A number that float32 has no place for would arrive as infinity."""
    if MAX_FLOAT32 < abs(value) < math.inf:
        raise TooLarge(f"{name} must be at most {MAX_FLOAT32:g}, got {value:g}", param=name)
    return value
