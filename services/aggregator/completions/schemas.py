"""What /v1/completions and /v1/chat/completions take and give: OpenAI's shape, with vLLM's and this project's
fields beside it.

Unknown fields are ignored, as clients of many servers send some. A known field that is not served is refused unless its
value changes nothing; null is each field's default.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import PydanticCustomError

from knnlm.generation import MAX_STOPS
from knnlm.sampling import MAX_LOGIT_BIAS, MAX_PENALTY
from services.aggregator.schemas.explaining import ExplainedToken
from services.aggregator.schemas.mixing import IDS_SCHEMA, Knn, Sourced, UsedDomain, UsedMemory, are_token_ids, by_type
from services.runtime.schemas import FirstProblem, Text, encodable

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
MAX_SEED = 2**63

# fields of OpenAI's and vLLM's interfaces that would change the answer and are not served: the values that would not
NEUTRAL: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "max_completion_tokens": (),
    "top_logprobs": (0,),
    "detokenize": (True,),
    "prompt_logprobs": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "return_token_ids": (False,),
    "prompt_embeds": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": ("",),
    "guided_choice": ([],),
    "guided_grammar": ("",),
}
CHAT_NEUTRAL: dict[str, tuple[object, ...]] = {
    **NEUTRAL,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "add_special_tokens": (False,),
    "add_bos": (False,),
    "truncate_prompt_tokens": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
}
MESSAGE_NEUTRAL: dict[str, tuple[object, ...]] = {
    "tool_calls": ([],), "function_call": (), "tool_call_id": (), "audio": (), "refusal": (),
}  # fmt: skip
MAX_MESSAGES, MAX_PARTS = 4096, 1024  # whatever their texts


def _prompts(value: Any) -> list[Any]:  # Any: JSON
    """Several texts, or several rows of token ids, also where one was given."""
    rows = value if isinstance(value, list) and value and isinstance(value[0], str | list) else [value]
    if all(isinstance(row, str) for row in rows):
        encodable(rows)
        return rows
    if not all(map(are_token_ids, rows)):
        raise PydanticCustomError(
            "prompts", "expected a text, a list of texts, token ids >= 0, or lists of them, none of them empty"
        )
    return rows


def _bias(value: Any) -> dict[int, float]:  # Any: JSON
    """The biases by token id; JSON writes numbers that are keys as texts."""
    problem = PydanticCustomError(
        "logit_bias",
        'expected an object of numbers in [-{most}, {most}] by token id, as in {"50256": -100}',
        {"most": f"{MAX_LOGIT_BIAS:g}"},
    )
    if not isinstance(value, dict):
        raise problem
    bias = {}
    for token, number in value.items():
        if not (isinstance(token, str) and token.isascii() and token.isdigit() and len(token) <= 10):
            raise problem
        if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= MAX_LOGIT_BIAS:
            raise problem
        bias[int(token)] = float(number)
    return bias


def _texts(value: Any) -> list[str]:  # Any: JSON
    texts = value if isinstance(value, list) else [value]
    if len(texts) > MAX_STOPS:
        raise PydanticCustomError("stops", "at most {most} stop strings are taken", {"most": MAX_STOPS})
    if not all(isinstance(text, str) for text in texts):
        raise PydanticCustomError("stops", "expected a text or a list of texts")
    encodable(texts)
    return texts


_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT}
Prompts = Annotated[
    Any,
    PlainValidator(_prompts),
    WithJsonSchema(
        {"anyOf": [_TEXT, {**_TEXTS, "minItems": 1}, IDS_SCHEMA, {"type": "array", "items": IDS_SCHEMA, "minItems": 1}]}
    ),
]
Stops = Annotated[Any, PlainValidator(_texts), WithJsonSchema({"anyOf": [_TEXT, {**_TEXTS, "maxItems": MAX_STOPS}]})]
Bias = Annotated[
    Any,
    PlainValidator(_bias),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {"type": "number"},
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        }
    ),
]


class StreamOptions(BaseModel):
    include_usage: StrictBool | None = Field(None, description="End with a chunk that has `usage` and no choices.")
    continuous_usage_stats: StrictBool | None = Field(
        None, description="With include_usage: `usage` so far in every chunk."
    )


class CompletionKnn(Knn):
    explain: Annotated[StrictInt, Field(ge=0)] | None = Field(
        None, description="Say of each token what made it, with this many of the passages that gave it most."
    )
    explain_tokens: Annotated[StrictInt, Field(ge=0)] | None = Field(
        None, description="Tokens of text on each side of those; by default 24."
    )


class Sampled(Sourced):
    """What requests for text have in common. neutral: fields that are not served, with the values that change
    nothing."""

    model_config = ConfigDict(extra="allow", frozen=True)
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = NEUTRAL

    knn: CompletionKnn | None = None
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = Field(None, description="Tokens of each choice at most.")
    n: Annotated[StrictInt, Field(ge=1, lt=MAX_SEED)] | None = Field(
        None, description="Choices for each prompt; by default 1."
    )
    temperature: Annotated[Number, Field(ge=0)] | None = Field(None, description="0: the likeliest token; default 1.")
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1)] | None = Field(None, description="0 or -1: all tokens.")
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)] | None = None
    logit_bias: Bias | None = Field(None, description="Added to the log-probability of tokens, by their id.")
    stop: Stops | None = Field(None, description="Texts before which a choice ends.")
    stop_token_ids: (
        Annotated[list[Annotated[StrictInt, Field(ge=0)]], FirstProblem(), Field(max_length=MAX_STOPS)] | None
    ) = Field(None, description="Tokens before which a choice ends, beside EOS.")
    ignore_eos: StrictBool | None = Field(None, description="Go on behind the EOS token.")
    seed: Annotated[StrictInt, Field(ge=-MAX_SEED, lt=MAX_SEED)] | None = Field(
        None, description="Seed of the draws: with the same one a choice is the same, whatever else is under way."
    )
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None
    return_tokens_as_token_ids: StrictBool | None = Field(None, description='Name tokens in logprobs "token_id:42".')


class CompletionRequest(Sampled):
    prompt: Prompts = Field(description="A text, several, token ids, or several lists of them, used as they are.")
    best_of: Annotated[StrictInt, Field(ge=1, lt=MAX_SEED)] | None = Field(
        None, description="Choices to make, of which the n with the largest mean log-probability are given."
    )
    echo: StrictBool | None = Field(None, description="Give the prompt, too, and with `logprobs` how likely it is.")
    logprobs: Annotated[StrictInt, Field(ge=0)] | None = Field(
        None, description="Log-probabilities in the mixture of each token and of this many of the likeliest."
    )
    add_special_tokens: StrictBool | None = Field(
        None, description="false: no BOS before a text, even if the tokenizer's own rule puts one there."
    )
    add_bos: StrictBool | None = Field(
        None, description="true: BOS before every text, as documents of datastores begin; false: never."
    )
    truncate_prompt_tokens: Annotated[StrictInt, Field(ge=-1)] | None = Field(
        None, description="Keep this many tokens of the prompt's end; -1: as many as the model takes."
    )

    @property
    def given(self) -> str:
        return "prompt"


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


Content = Annotated[
    Annotated[Text, Tag("a_text")]
    | Annotated[list[TextPart], FirstProblem(), Field(max_length=MAX_PARTS), Tag("a_list_of_parts")],
    by_type(a_text=str, a_list_of_parts=list),
]


class Message(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    role: Text = Field(description="As the model's chat template knows them: system, user, assistant, ...")
    content: Content | None = Field(
        description="A text, or parts of one, which are joined by line ends; null of an assistant's message is no text."
    )
    name: Text | None = None

    @field_validator("content")
    @classmethod
    def _said(cls, content: Any, info: ValidationInfo) -> Any:  # Any: Content
        if content is None and info.data.get("role", "assistant") != "assistant":
            raise PydanticCustomError("no_content", "expected a text or a list of parts; null is an assistant's alone")
        return content

    @property
    def rendered(self) -> dict[str, str]:
        """What the template is given."""
        parts = self.content or ""
        content = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        return {"role": self.role, "content": content, **({} if self.name is None else {"name": self.name})}


class ChatRequest(Sampled):
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = CHAT_NEUTRAL

    messages: Annotated[list[Message], FirstProblem(), Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="What was said so far, of which the model's chat template makes the prompt."
    )
    max_completion_tokens: Annotated[StrictInt, Field(ge=0)] | None = Field(None, description="As `max_tokens`.")
    logprobs: StrictBool | None = Field(None, description="Log-probabilities in the mixture of each token.")
    top_logprobs: Annotated[StrictInt, Field(ge=0)] | None = Field(
        None, description="With `logprobs`: those of this many of the likeliest tokens."
    )

    @property
    def given(self) -> str:
        return "messages"


class Logprobs(BaseModel):
    """Lists with one element for each token, the prompt's first with `echo`; the first of all has null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int] = Field(description="Where the token's text begins in `text`, in characters.")


class EndedChoice(BaseModel):
    """What choices of both kinds have."""

    index: int
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = Field(description="The stop string or the token id at which it ended.")
    explained: list[ExplainedToken] | None = Field(
        None, description="With knn.explain: each generated token as /v1/explain says it."
    )


class Choice(EndedChoice):
    text: str
    logprobs: Logprobs | None


class LikelyToken(BaseModel):
    token: str
    logprob: float
    bytes: list[int] = Field(description="What the token stands for, which need not be whole characters.")


class ChatToken(LikelyToken):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(BaseModel):
    content: list[ChatToken]


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(EndedChoice):
    message: AnswerMessage
    delta: ChatDelta | None = Field(None, description="In a stream, instead of `message`: what it has more of.")
    logprobs: ChatLogprobs | None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    searches_skipped: int = Field(0, description="Generated tokens for which nothing was searched, over all domains.")


class Made(BaseModel):
    """What answers of both kinds have."""

    id: str
    created: int
    model: str
    usage: Usage | None
    domains: list[UsedDomain]
    memories: list[UsedMemory]
    degraded: str | None = Field(description="Why the answer is the LM's alone; null when it is as asked.")


class Completion(Made):
    object: Literal["text_completion"] = "text_completion"
    choices: list[Choice]


class ChatCompletion(Made):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
