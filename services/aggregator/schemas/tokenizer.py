"""What the tokenizer's endpoints take and give: vLLM's shapes."""

from typing import Annotated

from pydantic import BaseModel, Field, StrictBool, StrictInt

from services.runtime.schemas import FirstProblem, Strict, Text

ParseSpecial = Annotated[
    StrictBool, Field(description="Special tokens written in the text count as such; else they are text.")
]


class TokenizeRequest(Strict):
    """vLLM's shape."""

    model: Text | None = None
    prompt: Text
    add_special_tokens: StrictBool = True
    return_token_strs: StrictBool = False
    parse_special: ParseSpecial = True  # lm-eval asks for the id of a special token by its text


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Strict):
    model: Text | None = None
    tokens: Annotated[list[Annotated[StrictInt, Field(ge=0)]], FirstProblem()]


class DetokenizeResponse(BaseModel):
    prompt: str
