"""What /v1/next_token and /v1/score take and give. Unknown fields are refused: nothing is accepted and ignored."""

from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    Tag,
    WithJsonSchema,
    create_model,
)
from pydantic_core import PydanticCustomError

from knnlm.messages import PASSAGE_TOKENS
from knnlm.options import ReuseOptions, SearchOptions
from knnlm.sources import SOURCES, source_kind
from services.aggregator.schemas.tokenizer import ParseSpecial
from services.runtime.schemas import FirstProblem, Strict, Text, option_fields

Lambda = Annotated[
    float, Field(strict=True, ge=0, le=1, allow_inf_nan=False, description="Weight of what is retrieved.")
]
Temperature = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False, description="Divides squared distances.")]
TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0)]], FirstProblem(), Field(min_length=1)]


def are_token_ids(value: Any) -> bool:  # Any: JSON
    """Whether it is a list of token ids, at least one."""
    return isinstance(value, list) and bool(value) and all(type(i) is int and i >= 0 for i in value)


def _token_rows(value: Any) -> list[list[int]]:  # Any: JSON
    """The ids of one context or of several, as several."""
    rows = value if isinstance(value, list) and value and all(isinstance(row, list) for row in value) else [value]
    if not all(map(are_token_ids, rows)):
        raise PydanticCustomError("token_rows", "expected token ids >= 0, or lists of them, none of them empty")
    return rows


IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
TokenRows = Annotated[
    Any,
    PlainValidator(_token_rows),
    WithJsonSchema({"anyOf": [IDS_SCHEMA, {"type": "array", "items": IDS_SCHEMA, "minItems": 1}]}),
]


def by_type(**kinds: type) -> Discriminator:
    """Which alternative a value is, by its JSON type, so that its problems are told of that one. kinds: type by tag."""

    def tag(value: Any) -> str | None:  # Any: JSON
        return next((name for name, kind in kinds.items() if isinstance(value, kind)), None)

    expected = " or ".join(name.replace("_", " ") for name in kinds)
    return Discriminator(tag, custom_error_type="alternatives", custom_error_message=f"expected {expected}")


class DomainChoice(Strict):
    """One of several domains. What is left out comes from the tuning stored with the domain."""

    domain: Text
    version: Text | None = Field(None, description="Answer from this version or not at all.")
    lmbda: Lambda | None = Field(None, alias="lambda")
    temperature: Temperature | None = None


MAX_DOMAIN_CHOICES = 1024  # whatever max_domains
DomainChoices = Annotated[
    list[
        Annotated[
            Annotated[Text, Tag("a_name")] | Annotated[DomainChoice, Tag("an_object")],
            by_type(a_name=str, an_object=dict),
        ]
    ],
    FirstProblem(),
    Field(min_length=1, max_length=MAX_DOMAIN_CHOICES),
]
Texts = Annotated[
    Annotated[Text, Tag("a_text")] | Annotated[list[Text], FirstProblem(), Tag("a_list_of_texts")],
    by_type(a_text=str, a_list_of_texts=list),
]


# type: ignore: mypy does not know classes that are made of a table
class Reuse(option_fields("ReuseFields", ReuseOptions, public=True)):  # type: ignore[misc]
    """What was found at one place, used for those behind it."""


class Knn(option_fields("SearchFields", SearchOptions, public=True)):  # type: ignore[misc]
    """Retrieval. Name a domain and nothing else, and its fitted temperature, lambda and k are used."""

    domain: Text | None = Field(None, description="The one domain to retrieve from.")
    domains: DomainChoices | None = Field(None, description="Or several.")
    combine: Literal["mixture", "union"] = Field(
        "mixture", description="Several domains: each its own softmax and weight, or one softmax over all neighbors."
    )
    version: Text | None = Field(None, description="With `domain`: answer from this version or not at all.")
    lmbda: Lambda | None = Field(None, alias="lambda")
    temperature: Temperature | None = None
    rule: Text | None = Field(
        None, description="How the weight of retrieval follows from what was found; by default as tuned, or `fixed`."
    )
    reuse: Reuse | None = None


class Sourced(BaseModel):
    """What a request says of the sources that are mixed. given: the field that holds the text."""

    model: Text | None = Field(None, description="An id of /v1/models: LM, LM+domain, LM~memory or LM+domain~memory.")
    knn: Knn | None = None
    on_datastore_error: Literal["fail", "lm_only"] | None = Field(
        None, description="When retrieval is down: fail with 503, or answer from the LM and say so in `degraded`."
    )

    @property
    def given(self) -> str:
        return "text" if getattr(self, "tokens", None) is None else "tokens"


Asking = TypeVar("Asking", bound=Sourced)


class Request(Sourced, Strict):
    parse_special: ParseSpecial = False


class NextTokenRequest(Request):
    text: Texts | None = Field(None, description="One context, or several.")
    tokens: TokenRows | None = Field(None, description="The same as token ids, used as they are.")
    truncate: Literal["left"] | None = Field(
        None, description="A context longer than the model takes: keep BOS and its end, instead of refusing it."
    )
    top_n: Annotated[StrictInt, Field(ge=0)] = Field(10, description="The likeliest tokens of the mixture.")
    full: StrictBool = Field(False, description="Also the whole distribution, in order of token ids.")
    encoding: Literal["list", "base64"] = Field("list", description="How the whole distribution is written.")
    neighbors: Annotated[StrictInt, Field(ge=0)] = Field(0, description="Nearest neighbors shown, with their source.")
    neighbor_tokens: Annotated[StrictInt, Field(ge=0)] = Field(
        PASSAGE_TOKENS, description="Tokens of text on each side of them."
    )


class ScoreRequest(Request):
    text: Text | None = Field(None, description="A text of any length.")
    tokens: TokenIds | None = Field(None, description="The same as token ids, used as they are.")
    context_length: Annotated[StrictInt, Field(ge=2)] | None = Field(
        None, description="Tokens fed to the model at once; by default as the domain was built."
    )
    min_context: Annotated[StrictInt, Field(ge=1)] | None = Field(
        None, description="Tokens that every scored token sees at least; by default as the domain was built."
    )


class TokenProbability(BaseModel):
    token_id: int
    token: str
    p: float
    p_lm: float
    p_knn: float | None = Field(description="null without retrieval, and where nothing was found.")


class Neighbor(BaseModel):
    domain: str
    distance: float = Field(description="Squared L2.")
    weight: float = Field(description="Its share of this domain's p_knn.")
    token_id: int
    token: str = Field(description="What it says comes next.")
    document: str
    position: int = Field(description="Where that token stands in the document, in tokens.")
    before: str
    after: str = Field(description="The token and what followed it.")


class Distribution(BaseModel):
    """Probabilities in order of token ids: lists, or packed little-endian float32 in base64."""

    p: Any
    p_lm: Any
    p_knn: Any = None


class Component(BaseModel):
    """One distribution of the mixture at this context. kind: `lm`, `knn`, or another source's."""

    name: str
    kind: str
    weight: float = Field(description="0 where it found nothing.")
    p: list[float] | None = Field(description="For each token of `top`; null where it found nothing.")
    searches_skipped: int = Field(0, description="1 where nothing was searched.")


class NextToken(BaseModel):
    context_tokens: int
    lmbda: float = Field(serialization_alias="lambda", description="What all components but the LM weighed here.")
    top: list[TokenProbability]
    components: list[Component] = Field(description="All that was mixed, the LM first; the weights add up to 1.")
    distribution: Distribution | None = None
    neighbors: list[Neighbor] | None = None


class UsedDomain(BaseModel):
    domain: str
    version: str
    k: int
    lmbda: float | None = Field(serialization_alias="lambda", description="null with a rule that has no one lambda.")
    temperature: float
    rule: str


class UsedMemory(BaseModel):
    """A memory that was mixed. Of one of weight 0, which was not asked, nothing but its name is known."""

    name: str
    lmbda: float = Field(serialization_alias="lambda")
    model_id: str | None
    fingerprint: str | None = Field(description="Of the model that answered.")


class NextTokenResponse(BaseModel):
    model: str
    domains: list[UsedDomain]
    memories: list[UsedMemory]
    degraded: str | None = Field(description="Why the answer is the LM's alone; null when it is as asked.")
    results: list[NextToken]


class ScoredToken(BaseModel):
    """Natural logarithms; null stands for minus infinity, which JSON cannot say."""

    token_id: int
    token: str
    log_p: float | None
    log_p_lm: float
    log_p_knn: float | None
    lmbda: float = Field(serialization_alias="lambda")


class ScoredComponent(BaseModel):
    """One distribution of the mixture, at every scored token."""

    name: str
    kind: str
    weight: list[float]
    log_p: list[float | None]
    searches_skipped: int = Field(0, description="Tokens for which nothing was searched.")


class ScoreResponse(BaseModel):
    model: str
    domains: list[UsedDomain]
    memories: list[UsedMemory]
    degraded: str | None
    first_token_id: int = Field(description="The token that nothing precedes: context, not scored.")
    tokens: list[ScoredToken]
    total_log_p: float | None
    total_log_p_lm: float
    perplexity: float | None = Field(description="exp of the mean of -log_p over the scored tokens.")
    perplexity_lm: float
    context_length: int
    min_context: int
    components: list[ScoredComponent] = Field(description="All that was mixed, the LM first.")


def with_sources(schema: type[Asking]) -> type[Asking]:
    """The request with a field for every row of knnlm.sources.SOURCES that it does not have yet."""
    others = [(name, source_kind(name).options) for name in SOURCES if name not in schema.model_fields]
    return _with_fields(schema, tuple(others)) if others else schema


@cache  # pydantic takes longer over these classes than FastAPI over all routes
def _with_fields(schema: type[Asking], records: tuple[tuple[str, type], ...]) -> type[Asking]:
    fields: dict[str, Any] = {}  # Any: types as pydantic annotates them
    for name, record in records:
        fields[name] = (option_fields(f"{name.title()}Options", record, public=True) | None, None)
    return create_model(schema.__name__, __base__=schema, **fields)
