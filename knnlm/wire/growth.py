"""Documents on their way into a domain, and what became of them: as protobuf and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from knnlm.errors import InvalidRequest
from knnlm.messages import Document, DomainChange
from knnlm.v1 import datastore_pb2
from knnlm.wire.protos import packed

__all__ = [
    "add_to_proto", "change_from_json", "change_from_proto", "change_to_json", "change_to_proto",
    "documents_from_proto", "documents_to_json",
]  # fmt: skip

Json = Mapping[str, Any]  # Any: what JSON holds, checked field by field


def add_to_proto(domain: str, documents: Sequence[Document], *, replace: bool) -> datastore_pb2.AddDocumentsRequest:
    """Raises InvalidRequest for text that is not valid Unicode."""
    messages = [packed(datastore_pb2.Document, id=document.id, text=document.text) for document in documents]
    return packed(datastore_pb2.AddDocumentsRequest, domain=domain, documents=messages, replace=replace)


def documents_from_proto(message: datastore_pb2.AddDocumentsRequest) -> list[Document]:
    return [Document(document.id, document.text) for document in message.documents]


def documents_to_json(documents: Sequence[Document], *, replace: bool) -> dict[str, object]:
    return {"documents": [asdict(document) for document in documents], "replace": replace}


def change_to_proto(change: DomainChange) -> datastore_pb2.DomainChange:
    return datastore_pb2.DomainChange(**asdict(change))


def change_from_proto(message: datastore_pb2.DomainChange) -> DomainChange:
    given = {field.name: getattr(message, field.name) for field in fields(DomainChange)}
    return DomainChange(**{**given, "advice": message.advice if message.HasField("advice") else None})


def change_to_json(change: DomainChange) -> dict[str, object]:
    return asdict(change)


def change_from_json(given: Json) -> DomainChange:
    """Raises InvalidRequest, naming the field, for an answer that is none."""
    kinds: dict[str, type | tuple[type, ...]]
    kinds = {"domain": str, "version": str, "parent": str, "advice": (str, type(None))}
    values: dict[str, Any] = {}  # checked against its kind
    for field in fields(DomainChange):
        value, kind = given.get(field.name), kinds.get(field.name, int)
        if not isinstance(value, kind):
            raise InvalidRequest(f"{field.name} is missing or of another type, got {value!r:.80}", param=field.name)
        values[field.name] = value
    return DomainChange(**values)
