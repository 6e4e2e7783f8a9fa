"""JSON bodies and kinds of fields that several services share."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    WithJsonSchema,
    create_model,
)
from pydantic_core import PydanticCustomError

from knnlm.options import SEARCH_OPTIONS, SearchOptions

__all__ = [
    "AddDocumentsBody",
    "Array",
    "ChangeAnswer",
    "DocumentBody",
    "Encoding",
    "RemoveDocumentsBody",
    "Strict",
    "Text",
    "TuningAnswer",
    "encodable",
    "search_fields",
]

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


Text = Annotated[StrictStr, AfterValidator(encodable)]  # every text that comes in

Encoding = Annotated[
    Literal["list", "base64"],
    Field(description="Of the arrays in the answer: lists of numbers for people, packed base64 for programs."),
]


class Strict(BaseModel):
    """A request body: unknown fields are refused, nothing is accepted and ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def search_fields(name: str, *, public: bool) -> type[Strict]:
    """A base for schemas with the fields of knnlm.options.SearchOptions; public: only what any caller may give."""
    kinds: dict[type, Any] = {  # Any: types as pydantic annotates them
        int: StrictInt,
        float: Annotated[float, Field(strict=True, allow_inf_nan=False)],
        bool: StrictBool,
        tuple: list[Text],
    }
    fields: dict[str, Any] = {}
    for option_name, option in SEARCH_OPTIONS.items():
        default = getattr(SearchOptions, option_name)
        kind = kinds[option.kind]
        if option.minimum is not None:
            kind = Annotated[kind, Field(ge=option.minimum)]
        if option.public or not public:
            described = Field(list(default) if option.kind is tuple else default, description=option.description)
            fields[option_name] = (kind if default is not None else kind | None, described)
    return create_model(name, __base__=Strict, **fields)


class SearchQualityAnswer(BaseModel):
    """One way to search that was measured while tuning."""

    name: str
    search: dict[str, Any] = Field(description="The search options that it differs by.")
    perplexity: float
    queries_per_second: float | None
    chosen: bool


class TuningAnswer(BaseModel):
    """Fitted on documents that are in neither the datastore nor any reported figure."""

    temperature: float
    lmbda: float = Field(alias="lambda")
    k: int
    lm_perplexity: float
    knn_perplexity: float
    tokens: int
    documents: int
    rule: str = Field(description="The lambda rule.")
    parameters: dict[str, float | list[float]] = Field(description="What was fitted for the rule.")
    search: dict[str, Any] = Field(description="Search options that were fitted; asked-for ones go before them.")
    index: str | None = Field(description="The index that `search` was fitted for.")
    quality: list[SearchQualityAnswer] = Field(description="What was measured to choose `search`.")


class DocumentBody(Strict):
    id: Text = Field(description="1 to 4096 characters, the name it is removed by.")
    text: Text = Field(description="Not empty.")


class AddDocumentsBody(Strict):
    documents: list[DocumentBody]
    replace: StrictBool = Field(
        False, description="Documents of these ids that exist are removed in the same step; otherwise they are refused."
    )


class RemoveDocumentsBody(Strict):
    ids: list[Text] = Field(description="Ids of documents; when one does not exist, nothing is removed.")


class ChangeAnswer(BaseModel):
    domain: str
    version: str = Field(description="The version that answers now.")
    parent: str = Field(description="The version that answered before.")
    added_documents: int
    added_entries: int
    removed_documents: int
    removed_entries: int
    advice: str | None = Field(description="When compacting is worth while.")
