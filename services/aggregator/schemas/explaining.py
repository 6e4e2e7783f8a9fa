"""What /v1/explain takes and gives."""

from typing import Annotated

from pydantic import BaseModel, Field, StrictInt, Tag

from services.aggregator.schemas.mixing import ScoreRequest, TokenIds, UsedDomain, by_type
from services.runtime.schemas import Text

TextOrIds = Annotated[
    Annotated[Text, Tag("a_text")] | Annotated[TokenIds, Tag("a_list_of_token_ids")],
    by_type(a_text=str, a_list_of_token_ids=list),
]


class ExplainRequest(ScoreRequest):
    prompt: TextOrIds | None = Field(None, description="With `completion`: what stands before it, not explained.")
    completion: TextOrIds | None = Field(
        None, description="In place of `text`: explained as it follows `prompt`, as text or ids as that is."
    )
    passages: Annotated[StrictInt, Field(ge=0)] = Field(
        3, description="Entries shown for each token, those that gave it most first, with the text around them."
    )
    passage_tokens: Annotated[StrictInt, Field(ge=0)] = Field(24, description="Tokens of text on each side of them.")

    @property
    def given(self) -> str:
        alone = self.text is None and self.tokens is None and self.completion is not None
        return "completion" if alone else super().given


class ExplainedPassage(BaseModel):
    domain: str
    document: str
    position: int = Field(description="Where the token stands in the document, in tokens.")
    distance: float = Field(description="Squared L2.")
    share: float = Field(description="Its part of what all entries that store the token gave it; these add up to 1.")
    before: str
    after: str = Field(description="The token and what followed it.")


class ExplainedComponent(BaseModel):
    """One distribution of the mixture at one token. kind: `lm`, `knn`, or another source's."""

    name: str
    kind: str
    weight: float = Field(description="0 where it found nothing.")
    log_p: float | None
    passages: list[ExplainedPassage] = Field(description="Those that gave most first.")


class ExplainedToken(BaseModel):
    """Natural logarithms; null stands for minus infinity, which JSON cannot say."""

    token_id: int
    token: str
    log_p: float | None
    log_p_lm: float
    lmbda: float = Field(serialization_alias="lambda", description="What all components but the LM weighed here.")
    components: list[ExplainedComponent] = Field(description="All that was mixed, the LM first.")


class ExplainedDocument(BaseModel):
    domain: str
    document: str
    probability: float = Field(description="Sum over tokens of weight times p times share of its passages.")
    share: float = Field(description="Its part of all that retrieval gave the text, shown or not.")
    tokens: int = Field(description="How many of the tokens it gave something to.")


class ExplainResponse(BaseModel):
    model: str
    domains: list[UsedDomain]
    degraded: str | None
    context: str = Field(description="What stands before the first token that is explained.")
    tokens: list[ExplainedToken]
    documents: list[ExplainedDocument] = Field(description="Those of the passages, those that gave most first.")
    total_log_p: float | None
    total_log_p_lm: float
    perplexity: float | None = Field(description="exp of the mean of -log_p over the tokens.")
    perplexity_lm: float
    context_length: int
    min_context: int
