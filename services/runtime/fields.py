"""Kinds of fields that the schemas of several services share."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictStr, WithJsonSchema
from pydantic_core import PydanticCustomError

from services.runtime.packed import PROTOBUF

__all__ = ["PROTOBUF_TOO", "Array", "Encoding", "Strict", "Text", "encodable"]

Given = TypeVar("Given")

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


def encodable(value: Given) -> Given:
    """The text, or list of texts among others, as it came. Raises an error of pydantic for half of a surrogate pair
    ("\\ud800"), which JSON can write: it is no character and has no bytes in UTF-8."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str):
            try:
                text.encode()
            except UnicodeEncodeError as err:
                reason = {"at": err.start}
                raise PydanticCustomError("not_unicode", "not valid Unicode at character {at}", reason) from err
    return value


Text = Annotated[StrictStr, AfterValidator(encodable)]  # of every text that comes in

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
