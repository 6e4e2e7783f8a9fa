"""What /v1/explain takes and gives."""

from typing import Annotated

from pydantic import BaseModel, Field, StrictInt, Tag

from knnlm.attribution import DocumentShare
from knnlm.clients import explained
from knnlm.messages import PASSAGE_TOKENS
from services.aggregator.schemas.mixing import ScoreRequest, TokenIds, UsedDomain, UsedMemory, by_type
from services.runtime.schemas import Text, answer

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
    passage_tokens: Annotated[StrictInt, Field(ge=0)] = Field(
        PASSAGE_TOKENS, description="Tokens of text on each side of them."
    )

    @property
    def given(self) -> str:
        alone = self.text is None and self.tokens is None and self.completion is not None
        return "completion" if alone else super().given


class ExplainedToken(answer(explained.ExplainedToken)):  # type: ignore[misc]  # made of the record
    __doc__ = explained.ExplainedToken.__doc__


class ExplainedDocument(answer(DocumentShare)):  # type: ignore[misc]  # made of the record
    __doc__ = DocumentShare.__doc__


class ExplainResponse(BaseModel):
    model: str
    domains: list[UsedDomain]
    memories: list[UsedMemory]
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
    searches_skipped: int = Field(0, description="Tokens for which nothing was searched, over all components.")
