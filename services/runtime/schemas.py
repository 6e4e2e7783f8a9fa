"""JSON bodies and kinds of fields that several services share."""

from collections.abc import Collection
from dataclasses import fields as dataclass_fields
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    WithJsonSchema,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from knnlm.messages import DomainChange
from knnlm.options import MAX_EXCLUDED_DOCUMENTS, SearchOptions, options_of
from knnlm.wire.records import Array as ArrayKind
from knnlm.wire.records import Either, Kind, List, Map, Nullable, Numbers, Record, Scalar, fields_of
from knnlm.wire.records import Field as RecordField

Given = TypeVar("Given")

MAX_DOCUMENTS = 16_384  # documents in one body, whatever a service's max_documents

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


Text = Annotated[StrictStr, AfterValidator(encodable)]  # every text that comes in

Encoding = Annotated[
    Literal["list", "base64"],
    Field(description="Of the arrays in the answer: lists of numbers for people, packed base64 for programs."),
]


class FirstProblem(FailFast):
    """Annotates a list: its first wrong element is the last that is looked at. Unlike FailFast it can be hashed, as
    alternatives of a type must be."""

    __hash__ = object.__hash__


class Strict(BaseModel):
    """A request body: unknown fields are refused, nothing is accepted and ignored.

    Its lists are annotated with FirstProblem: pydantic describes every problem it finds, and a body may have millions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field(cls, given: Any) -> Any:  # Any: JSON
        """The object with the first of its unknown fields and no other, where it has more fields than are known."""
        if not isinstance(given, dict) or len(given) <= len(cls.model_fields):
            return given
        known = {field.alias or name for name, field in cls.model_fields.items()}
        known.add(next(name for name in given if name not in known))
        return {name: given[name] for name in known if name in given}


def option_fields(name: str, record: type, *, public: bool) -> type[Strict]:
    """A base for schemas with the fields of a record of knnlm.options; public: only what any caller may give."""
    kinds: dict[type, Any] = {  # Any: types as pydantic annotates them
        int: StrictInt,
        float: Annotated[float, Field(strict=True, allow_inf_nan=False)],
        bool: StrictBool,
        str: Text,
        tuple: Annotated[list[Text], FirstProblem(), Field(max_length=MAX_EXCLUDED_DOCUMENTS)],
    }
    chosen: dict[str, Any] = {}
    defaults: dict[str, Any] = {field.name: field.default for field in dataclass_fields(record)}
    for option_name, option in options_of(record).items():
        default = defaults[option_name]
        kind = kinds[option.kind]
        if option.minimum is not None:
            kind = Annotated[kind, Field(ge=option.minimum)]
        if option.public or not public:
            alias = "lambda" if option_name == "lmbda" else None
            shown = list(default) if option.kind is tuple else default
            described = Field(shown, alias=alias, description=option.description)
            chosen[option_name] = (kind if default is not None else kind | None, described)
    return create_model(name, __base__=Strict, **chosen)


def body_fields(record: type, *, without: Collection[str] = (), max_items: int | None = None) -> type[Strict]:
    """A base for a body with the fields of a record of knnlm/messages.py, as knnlm.wire.jsonable reads them.

    max_items: of every list.
    """
    fields: dict[str, Any] = {}  # Any: as create_model takes them
    base: type[Strict] = Strict
    for name, field in _described(record).items():
        if field.inlined:
            base = option_fields(f"{record.__name__}Options", SearchOptions, public=False)
            continue
        kind = _TAKEN[field.kind.type] if isinstance(field.kind, Scalar) else _annotation(field.kind)
        if isinstance(field.kind, List) and max_items is not None:
            kind = Annotated[kind, Field(max_length=max_items)]
        default = ... if field.required else getattr(record, name)
        if name not in without:
            fields[name] = (kind | None if field.nullable else kind, default)
    return create_model(f"{record.__name__}Fields", __base__=base, **fields)


def answer(record: type) -> type[BaseModel]:
    """The JSON of a record of knnlm/messages.py, as knnlm.wire.jsonable writes it: for OpenAPI, or to be filled."""
    return _answer(record)  # once: OpenAPI knows a model by its name


@cache
def _answer(record: type) -> type[BaseModel]:
    fields: dict[str, Any] = {}  # Any: as create_model takes them
    for name, field in _described(record).items():
        if field.inlined and isinstance(field.kind, Record):
            inner = answer(field.kind.type).model_fields
            fields |= {n: (info.annotation, info) for n, info in inner.items()}
            continue
        kind = _annotation(field.kind)
        alias = field.wire if field.wire != name else None
        fields[name] = (kind | None if field.nullable else kind, Field(alias=alias))
    return create_model(record.__name__, __doc__=record.__doc__, **fields)


_TAKEN: dict[type, Any] = {bool: StrictBool, int: StrictInt, str: Text}  # Any: types as pydantic annotates them


def _described(record: type) -> dict[str, RecordField]:
    return {field.name: field for field in fields_of(record)}


def _annotation(kind: Kind) -> Any:  # Any: a type as pydantic takes it
    match kind:
        case ArrayKind():
            return Array
        case List(item=item):
            return Annotated[list[_annotation(item)], FirstProblem()]  # type: ignore[misc]  # computed
        case Map(item=item):
            return dict[str, _annotation(item)]  # type: ignore[misc]  # computed
        case Either(types=types):
            return Union[types]  # noqa: UP007  of a computed tuple
        case Nullable(item=item):
            return _annotation(item) | None
        case Numbers():
            return float | list[float]
        case Record(type=record):
            return dict[str, Any] if record is SearchOptions else answer(record)
        case Scalar(type=scalar):
            return scalar


class DocumentBody(Strict):
    id: Text = Field(description="1 to 4096 characters, none a control character: the name it is removed by.")
    text: Text = Field(description="Not empty.")


class AddDocumentsBody(Strict):
    documents: Annotated[list[DocumentBody], FirstProblem(), Field(max_length=MAX_DOCUMENTS)]
    replace: StrictBool = Field(
        False, description="Documents of these ids that exist are removed in the same step; otherwise they are refused."
    )


class RemoveDocumentsBody(Strict):
    ids: Annotated[list[Text], FirstProblem(), Field(max_length=MAX_DOCUMENTS)] = Field(
        description="Ids of documents; when one does not exist, nothing is removed."
    )


class ChangeAnswer(answer(DomainChange)):  # type: ignore[misc]  # made of the record
    __doc__ = DomainChange.__doc__
