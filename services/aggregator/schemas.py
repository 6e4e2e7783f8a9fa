"""What the aggregator's HTTP face takes and gives. Unknown fields are refused: nothing is accepted and ignored."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, StrictBool, StrictInt, StrictStr

from knnlm.messages import DomainInfo
from services.runtime.schemas import Strict, Text, answer, encodable, search_fields

Lambda = Annotated[
    float, Field(strict=True, ge=0, le=1, allow_inf_nan=False, description="Weight of what is retrieved.")
]
Temperature = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False, description="Divides squared distances.")]
ParseSpecial = Annotated[
    StrictBool, Field(description="Special tokens written in the text count as such; else they are text.")
]
TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(min_length=1)]


class DomainChoice(Strict):
    """One of several domains. What is left out comes from the tuning stored with the domain."""

    domain: Text
    version: Text | None = Field(None, description="Answer from this version or not at all.")
    lmbda: Lambda | None = Field(None, alias="lambda")
    temperature: Temperature | None = None


class Knn(search_fields("SearchFields", public=True)):  # type: ignore[misc]  # a class made of the table of options
    """Retrieval. Name a domain and nothing else, and its fitted temperature, lambda and k are used."""

    domain: Text | None = Field(None, description="The one domain to retrieve from.")
    domains: Annotated[list[StrictStr | DomainChoice], AfterValidator(encodable)] | None = Field(
        None, min_length=1, description="Or several."
    )
    combine: Literal["mixture", "union"] = Field(
        "mixture", description="Several domains: each its own softmax and weight, or one softmax over all neighbors."
    )
    version: Text | None = Field(None, description="With `domain`: answer from this version or not at all.")
    lmbda: Lambda | None = Field(None, alias="lambda")
    temperature: Temperature | None = None
    rule: Text = Field("fixed", description="How lambda follows from what was found.")


class Request(Strict):
    model: Text | None = Field(None, description="An id of /v1/models: the LM, or LM+domain.")
    knn: Knn | None = None
    on_datastore_error: Literal["fail", "lm_only"] | None = Field(
        None, description="When retrieval is down: fail with 503, or answer from the LM and say so in `degraded`."
    )
    parse_special: ParseSpecial = False


class NextTokenRequest(Request):
    text: Annotated[StrictStr | list[StrictStr], AfterValidator(encodable)] | None = Field(
        None, description="One context, or several."
    )
    tokens: TokenIds | list[TokenIds] | None = Field(None, description="The same as token ids, used as they are.")
    top_n: Annotated[StrictInt, Field(ge=0)] = Field(10, description="The likeliest tokens of the mixture.")
    full: StrictBool = Field(False, description="Also the whole distribution, in order of token ids.")
    encoding: Literal["list", "base64"] = Field("list", description="Of the whole distribution.")
    neighbors: Annotated[StrictInt, Field(ge=0)] = Field(0, description="Nearest neighbors shown, with their source.")
    neighbor_tokens: Annotated[StrictInt, Field(ge=0)] = Field(24, description="Tokens of text on each side of them.")


class ScoreRequest(Request):
    text: Text | None = Field(None, description="A text of any length.")
    tokens: TokenIds | None = Field(None, description="The same as token ids, used as they are.")
    min_context: Annotated[StrictInt, Field(ge=1)] | None = Field(
        None, description="Tokens that every scored token sees at least; default half of the context length."
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
    position: int = Field(description="Of that token in the document, in tokens.")
    before: str
    after: str = Field(description="The token and what followed it.")


class Distribution(BaseModel):
    """Probabilities in order of token ids: lists, or packed little-endian float32 in base64."""

    p: Any
    p_lm: Any
    p_knn: Any = None


class NextToken(BaseModel):
    context_tokens: int
    lmbda: float = Field(serialization_alias="lambda", description="What retrieval weighed here.")
    top: list[TokenProbability]
    distribution: Distribution | None = None
    neighbors: list[Neighbor] | None = None


class UsedDomain(BaseModel):
    domain: str
    version: str
    k: int
    lmbda: float = Field(serialization_alias="lambda")
    temperature: float


class NextTokenResponse(BaseModel):
    model: str
    domains: list[UsedDomain]
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


class ScoreResponse(BaseModel):
    model: str
    domains: list[UsedDomain]
    degraded: str | None
    first_token_id: int = Field(description="The token that nothing precedes: context, not scored.")
    tokens: list[ScoredToken]
    total_log_p: float | None
    total_log_p_lm: float
    perplexity: float | None = Field(description="exp of the mean of -log_p over the scored tokens.")
    perplexity_lm: float
    min_context: int


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "knnlm"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Domain(answer(DomainInfo)):  # type: ignore[misc]  # made of the record
    __doc__ = DomainInfo.__doc__


class DomainReplica(BaseModel):
    """One replica of the datastore service, as it answers now."""

    address: str
    version: str | None = Field(description="The one it answers from; null when it does not answer.")
    state: str = Field(description="ready, loading VERSION, stale: REASON, down, or an error code.")
    problem: str | None = Field(description="What it says when it is not well.")


class DomainStatus(Domain):
    replicas: list[DomainReplica] = Field(description="Those that serve the domain, and those that do not answer.")


class DomainList(BaseModel):
    domains: list[Domain]


class ActivateRequest(Strict):
    version: Text
    wait: StrictBool = Field(False, description="Answer when every replica that serves the domain does so from it.")


class TokenizeRequest(Strict):
    """vLLM's shape."""

    model: Text | None = None
    prompt: Text
    add_special_tokens: StrictBool = True
    return_token_strs: StrictBool = False
    parse_special: ParseSpecial = False


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Strict):
    model: Text | None = None
    tokens: list[Annotated[StrictInt, Field(ge=0)]]


class DetokenizeResponse(BaseModel):
    prompt: str
