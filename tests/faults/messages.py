"""Protobuf messages as nobody should send them: valid ones with wrong contents, and bytes that are none.

The generator walks the descriptors, so that fields and rpcs of later are covered without a change here.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from knnlm.v1 import common_pb2, datastore_pb2, lm_pb2

__all__ = ["SEEDS", "Method", "fuzzed", "hostile_tensors", "methods"]

Method = tuple[str, type[Message]]

INTS = (0, 1, -1, 2, 7, 100, 255, 4096, 4097, 65_537, 2**31 - 1, -(2**31), 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 3.4e38, 1e300, -1e300, math.nan, math.inf, -math.inf)
TEXTS = (
    "",
    "toy",
    "../toy",
    "v1",
    "v9",
    "a/b",
    "\x00",
    "naïve",
    "😀" * 50,
    "%s%n",
    "x" * 5000,
    "😀" * 20_000,
    "x" * 300_000,
)
SHAPES: Sequence[Sequence[int]] = (
    (), (0,), (0, 0), (1,), (2**40,), (2**31, 2**31), (2**31 - 1, 2**31 - 1), (2**62, 4), (2**63 - 1,), (-1,), (-1, 16),
    (4, -16), (2**31 - 1, 0), (0, 2**31 - 1), (0, 16), (1, 1, 1), (1,) * 64, (64,), (4, 16), (16, 4), (2**32, 2**32),
)  # fmt: skip


def methods(module: Any) -> Iterator[Method]:
    """Every rpc of a module that protoc has made: its full name as a path, and what it takes."""
    for service in module.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            taken = getattr(module, method.input_type.name)
            yield f"/{service.full_name}/{method.name}", taken


def _tensor(dtype: int, shape: Sequence[int], item: bytes) -> common_pb2.Tensor:
    return common_pb2.Tensor(dtype=dtype, shape=shape, data=item * math.prod(shape))  # type: ignore[arg-type]  # an enum


# valid ones to begin with, for the toy model (16 dimensions, 258 tokens, 32 of context) and its datastore
SEEDS: Mapping[type[Message], Sequence[Message]] = {
    datastore_pb2.SearchRequest: (
        datastore_pb2.SearchRequest(domain="toy", queries=_tensor(1, (4, 16), b"\0\0\x80\x3f"), k=8),
        datastore_pb2.SearchRequest(
            domain="toy", queries=_tensor(2, (2, 16), b"\0\x3c"), k=300, version="v1", rescore=True, overfetch=2.0,
            ids=True, passages=2, passage_tokens=3, exclude_entries=_tensor(4, (2,), b"\1" + 7 * b"\0"),
            exclude_own_documents=True, exclude_documents=["1"], nprobe=4,
        ),
    ),
    datastore_pb2.GetPassagesRequest: (
        datastore_pb2.GetPassagesRequest(
            domain="toy", version="v1", entries=_tensor(4, (3,), b"\1" + 7 * b"\0"), passage_tokens=3
        ),
    ),
    datastore_pb2.GetDomainRequest: (datastore_pb2.GetDomainRequest(domain="toy", version="v1"),),
    datastore_pb2.ListDomainsRequest: (datastore_pb2.ListDomainsRequest(),),
    datastore_pb2.ActivateVersionRequest: (datastore_pb2.ActivateVersionRequest(domain="toy", version="v1"),),
    datastore_pb2.AddDocumentsRequest: (
        datastore_pb2.AddDocumentsRequest(
            domain="grown", documents=[datastore_pb2.Document(id="n", text="the cat")], replace=True
        ),
    ),
    datastore_pb2.RemoveDocumentsRequest: (datastore_pb2.RemoveDocumentsRequest(domain="grown", ids=["n"]),),
    lm_pb2.ForwardRequest: (
        lm_pb2.ForwardRequest(
            tokens=_tensor(3, (6,), b"\5\0\0\0"), lengths=[4, 2], positions=_tensor(3, (2,), b"\1\0\0\0"),
            position_counts=[1, 1], targets=_tensor(3, (2,), b"\7\0\0\0"), top_n=3, keys=True,
            candidates=_tensor(3, (3,), b"\7\0\0\0"), candidate_counts=[1, 2],
            temperatures=_tensor(1, (2,), b"\0\0\x80\x3f"), cache=True,
        ),
        lm_pb2.ForwardRequest(
            tokens=_tensor(3, (6,), b"\5\0\0\0"), lengths=[6], positions=_tensor(3, (1,), b"\5\0\0\0"),
            position_counts=[1], full=True,
        ),
    ),
    lm_pb2.GetModelRequest: (lm_pb2.GetModelRequest(include_tokenizer=True),),
}  # fmt: skip


def fuzzed(taken: type[Message], rng: random.Random) -> bytes:
    """One message for an rpc that takes `taken`: most are well formed, and mean something only by accident."""
    kind = rng.random()
    if kind < 0.1:
        return rng.randbytes(rng.choice((0, 1, 3, 10, 100, 5000)))
    message = taken()
    message.CopyFrom(rng.choice(SEEDS[taken]))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _mutate(message, rng)
    raw = bytearray(message.SerializeToString())
    if kind < 0.2 and raw:
        del raw[rng.randrange(len(raw)) :]
    elif kind < 0.3 and raw:
        for _ in range(rng.choice((1, 2, 8))):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    elif kind < 0.35:
        raw += b"\xf8\x07\x01" * rng.choice((1, 1000))  # field 127, which no message has
    elif kind < 0.4:
        raw += bytes(raw)  # fields said twice: the last one counts, repeated ones add up
    return bytes(raw)


def hostile_tensors() -> Iterator[common_pb2.Tensor]:
    """Every shape that must not be believed, of every dtype, with few bytes or none."""
    for number, shape in enumerate(SHAPES):
        for dtype in (1, 2, 3, 4, (0, 99)[number % 2]):
            data = b"\0" * (0, 64, 63)[(number + dtype) % 3]
            tensor = common_pb2.Tensor(shape=[_int64(side) for side in shape], data=data)
            tensor.dtype = dtype  # type: ignore[assignment]  # an open enum: unknown numbers are kept
            yield tensor


def _int64(value: int) -> int:
    return max(-(2**63), min(2**63 - 1, value))


def _mutate(message: Message, rng: random.Random) -> None:
    if not message.DESCRIPTOR.fields:
        return
    field = cast(FieldDescriptor, rng.choice(list(message.DESCRIPTOR.fields)))  # two classes of it in the stubs
    if rng.random() < 0.1:
        message.ClearField(field.name)
    elif field.is_repeated:
        _mutate_repeated(message, field, rng)
    elif field.message_type is not None:
        child = getattr(message, field.name)
        child.SetInParent()
        if field.message_type.name == "Tensor" and rng.random() < 0.5:
            child.CopyFrom(rng.choice(_TENSORS))
        else:
            _mutate(child, rng)
    else:
        setattr(message, field.name, _value(field, rng))


def _mutate_repeated(message: Message, field: FieldDescriptor, rng: random.Random) -> None:
    values = getattr(message, field.name)
    if field.message_type is not None:
        child = values.add()
        _mutate(child, rng)
        if child.ByteSize() < 1000:
            values.extend([child] * rng.choice((0, 0, 2000)))
    elif field.name == "shape":
        del values[:]
        values.extend(_int64(side) for side in rng.choice(SHAPES))
    elif rng.random() < 0.3:
        del values[:]
    else:
        value = _value(field, rng)
        values.extend([value] * rng.choice((1, 1, 5, 2000 if not isinstance(value, str) or len(value) < 10 else 2)))


def _value(field: FieldDescriptor, rng: random.Random) -> Any:  # of whatever type the field has
    makers: Mapping[int, Callable[[], Any]] = {
        FieldDescriptor.CPPTYPE_INT32: lambda: rng.choice([n for n in INTS if -(2**31) <= n < 2**31]),
        FieldDescriptor.CPPTYPE_INT64: lambda: rng.choice(INTS),
        FieldDescriptor.CPPTYPE_FLOAT: lambda: rng.choice(FLOATS),
        FieldDescriptor.CPPTYPE_DOUBLE: lambda: rng.choice(FLOATS),
        FieldDescriptor.CPPTYPE_BOOL: lambda: rng.random() < 0.5,
        FieldDescriptor.CPPTYPE_ENUM: lambda: rng.choice((0, 1, 2, 3, 4, 5, 99, -1)),
        FieldDescriptor.CPPTYPE_STRING: lambda: (
            rng.choice(TEXTS)
            if field.type == FieldDescriptor.TYPE_STRING
            else rng.randbytes(rng.choice((0, 1, 63, 64, 256, 100_000)))
        ),
    }
    return makers[field.cpp_type]()


_TENSORS = list(hostile_tensors())
