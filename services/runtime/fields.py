"""Kinds of fields that the schemas of several services share."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from services.runtime.packed import PROTOBUF

__all__ = ["PROTOBUF_TOO", "Array", "Encoding", "Strict"]

_PACKED = {
    "type": "object",
    "required": ["dtype", "shape", "data"],
    "properties": {
        "dtype": {"enum": ["float32", "float16", "int32", "int64"]},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "data": {"type": "string", "description": "base64 of little-endian, row-major bytes"},
    },
}

# any JSON here: knnlm/wire reads it, and its errors name the field
Array = Annotated[
    Any, WithJsonSchema({"anyOf": [{"type": "array", "description": "nested lists of numbers"}, _PACKED]})
]

Encoding = Annotated[
    Literal["list", "base64"],
    Field(description="Of the arrays in the answer: lists of numbers for people, packed base64 for programs."),
]


class Strict(BaseModel):
    """A request body: what is not known is refused, nothing is accepted and ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# for openapi_extra of routes that have a PackedRoute
PROTOBUF_TOO: dict[str, Any] = {
    "requestBody": {"content": {PROTOBUF: {"schema": {"type": "string", "format": "binary"}}}},
    "responses": {"200": {"content": {PROTOBUF: {"schema": {"type": "string", "format": "binary"}}}}},
}
