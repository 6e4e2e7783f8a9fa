"""A request for text, read and checked: what is asked for, beside the schema, within the settings."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knnlm.decoding import end_of_context
from knnlm.errors import InvalidRequest, TooLarge
from knnlm.generation import GenerationOptions
from knnlm.messages import PASSAGE_TOKENS, ModelInfo
from knnlm.sampling import SamplingOptions
from knnlm.tokenizer import Tokenizer
from services.aggregator.completions.schemas import MESSAGE_NEUTRAL, ChatRequest, CompletionRequest, Sampled
from services.aggregator.completions.templates import TemplateProcess
from services.aggregator.requests import Inputs
from services.aggregator.settings import AggregatorSettings

Ids = npt.NDArray[np.int32]
DEFAULT_TOKENS = 16


@dataclass(frozen=True)
class CheckedRequest:
    """What one request asks to be generated, checked and with its defaults.

    prompts: (t,) int32 each. hidden_bos: of each, whether its first token is a BOS that was put before its text and is
    not shown. seed: of the draws. made: choices generated for each prompt, of which the best n are given. logprobs: how
    many of the likeliest tokens are listed beside each token, None for no log-probabilities at all. as_ids: tokens are
    named by their ids. explain: each token with what made it. usage_in_all: `usage` so far in every chunk.
    """

    prompts: Sequence[Ids]
    options: GenerationOptions
    seed: int
    n: int = 1
    made: int = 1
    echo: bool = False
    logprobs: int | None = None
    as_ids: bool = False
    hidden_bos: Sequence[bool] = ()
    explain: bool = False
    include_usage: bool = False
    usage_in_all: bool = False

    @property
    def choices(self) -> int:
        """How many are generated, for all prompts together."""
        return len(self.prompts) * self.made

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)


class RequestReader:
    """Reads requests for the completions of one model. template: of its chats, None where it has none."""

    def __init__(self, info: ModelInfo, tokenizer: Tokenizer, settings: AggregatorSettings) -> None:
        self._info = info
        self._tokenizer = tokenizer
        self._settings = settings
        self._inputs = Inputs(info, tokenizer, settings)
        self.template: TemplateProcess | None = None
        if tokenizer.chat_template is not None:
            bos, eos = ("" if i is None else tokenizer.token(i) for i in (info.bos_token_id, info.eos_token_id))
            self.template = TemplateProcess(
                tokenizer.chat_template, bos_token=bos, eos_token=eos, max_characters=settings.max_text_bytes
            )

    async def completion(self, request: CompletionRequest) -> CheckedRequest:
        """Raises InvalidRequest and TooLarge."""
        _refuse_unserved(request.model_extra, request.neutral)
        made = request.n or 1
        if request.best_of is not None:
            if request.best_of < made:
                raise InvalidRequest(f"best_of must be at least n = {made}, got {request.best_of}", param="best_of")
            if request.stream and request.best_of > made:
                raise InvalidRequest(
                    "best_of cannot be streamed: the best are known when all are there", param="best_of"
                )
        prompts, hidden_bos = await self._prompts(request)
        return self._checked(
            request,
            prompts,
            max_tokens=DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens,
            made=request.best_of or made,
            echo=bool(request.echo),
            logprobs=request.logprobs,
            hidden_bos=hidden_bos,
        )

    async def chat(self, request: ChatRequest, seconds: float) -> CheckedRequest:
        """seconds: to wait for the prompt. Raises InvalidRequest, also for a model without a chat template, TooLarge,
        DeadlineExceeded and Unavailable."""
        _refuse_unserved(request.model_extra, request.neutral)
        for i, message in enumerate(request.messages):
            _refuse_unserved(message.model_extra, MESSAGE_NEUTRAL, f"messages.{i}.")
        if request.top_logprobs and not request.logprobs:
            raise InvalidRequest("top_logprobs goes with logprobs: true", param="top_logprobs")
        if self.template is None:
            raise InvalidRequest(
                f"model {self._info.model_id} has no chat template, so that no prompt can be made of messages: give a "
                "prompt to /v1/completions instead",
                param="messages",
            )
        text = await self.template.render([message.rendered for message in request.messages], seconds)
        (prompt,) = await self._inputs.encoded([text], "messages")
        if self._info.bos_token_id is not None:
            prompt = prompt[1:]  # the template writes one where the model wants one
        limits, made = self._settings, request.n or 1
        most, param = request.max_completion_tokens, "max_completion_tokens"
        if most is None:
            most, param = request.max_tokens, "max_tokens"
        if most is None:  # to the end of the context
            most = max(1, min(self._info.context_length - len(prompt), limits.max_completion_tokens // made))
        return self._checked(
            request,
            [prompt],
            max_tokens=most,
            made=made,
            logprobs=request.top_logprobs or 0 if request.logprobs else None,
            hidden_bos=[False],
            params=(param, "top_logprobs"),
        )

    def _checked(
        self,
        request: Sampled,
        prompts: Sequence[Ids],
        *,
        max_tokens: int,
        made: int,
        logprobs: int | None,
        echo: bool = False,
        hidden_bos: Sequence[bool] = (),
        params: tuple[str, str] = ("max_tokens", "logprobs"),
    ) -> CheckedRequest:
        """params: the fields of max_tokens and logprobs."""
        if request.stream_options is not None and not request.stream:
            raise InvalidRequest("stream_options goes with stream: true", param="stream_options")
        limits = self._settings
        choices = len(prompts) * made
        if choices > limits.max_choices:
            raise TooLarge(
                f"{len(prompts)} prompts with {made} choices each are {choices} choices, at most "
                f"{limits.max_choices} are taken (--max-choices)",
                param="prompt" if made == 1 else "n" if made == request.n else "best_of",
            )
        if max_tokens * choices > limits.max_completion_tokens:
            raise TooLarge(
                f"{params[0]} {max_tokens} for each of {choices} choices is more than the "
                f"{limits.max_completion_tokens} tokens that one request may generate (--max-completion-tokens)",
                param=params[0],
            )
        if logprobs is not None and logprobs > limits.max_logprobs:
            raise TooLarge(
                f"{params[1]} must be at most {limits.max_logprobs}, got {logprobs} (--max-logprobs)", param=params[1]
            )
        knn = request.knn
        explain = None if knn is None else knn.explain
        if knn is not None and knn.explain_tokens is not None and explain is None:
            raise InvalidRequest("knn.explain_tokens goes with knn.explain", param="knn.explain_tokens")
        around = PASSAGE_TOKENS if knn is None or knn.explain_tokens is None else knn.explain_tokens
        self._check_explained(explain or 0, around, max_tokens * choices)
        stream = request.stream_options
        return CheckedRequest(
            prompts=prompts,
            options=GenerationOptions(
                max_tokens=max_tokens,
                sampling=_sampling(request),
                stop=tuple(text for text in request.stop or () if text),
                stop_token_ids=tuple(request.stop_token_ids or ()),
                ignore_eos=bool(request.ignore_eos),
                top=logprobs or 0,
                carriers=explain or 0,
                passage_tokens=around,
            ),
            seed=secrets.randbits(63) if request.seed is None else request.seed,
            n=request.n or 1,
            made=made,
            echo=echo,
            logprobs=logprobs,
            as_ids=bool(request.return_tokens_as_token_ids),
            hidden_bos=hidden_bos,
            explain=explain is not None,
            include_usage=stream is not None and bool(stream.include_usage),
            usage_in_all=stream is not None and bool(stream.continuous_usage_stats),
        )

    def _check_explained(self, passages: int, around: int, tokens: int) -> None:
        limits = self._settings
        for name, value in (("explain", passages), ("explain_tokens", around)):
            if value > limits.max_neighbors:
                raise TooLarge(f"knn.{name} must be at most {limits.max_neighbors}, got {value}", param=f"knn.{name}")
        if passages * tokens > limits.max_explained_passages:
            raise TooLarge(
                f"{tokens} tokens with {passages} passages each are more than {limits.max_explained_passages} "
                "(--max-explained-passages)",
                param="knn.explain",
            )

    async def _prompts(self, request: CompletionRequest) -> tuple[list[Ids], list[bool]]:
        """The prompts, and of each whether it begins with a BOS that its text does not have.

        A text gets the BOS that the tokenizer's own template puts before every text, if it does; special tokens that
        are written in it count as such. Token ids are used as they are.
        """
        if len(request.prompt) > self._settings.max_choices:
            raise TooLarge(
                f"prompt may hold {self._settings.max_choices} prompts, got {len(request.prompt)} (--max-choices)",
                param="prompt",
            )
        hidden_bos = [False] * len(request.prompt)
        if isinstance(request.prompt[0], str):
            prompts = await self._inputs.encoded(request.prompt, "prompt")
            bos = self._info.bos_token_id
            if bos is not None:  # each begins with it now
                hidden_bos = [self._puts_bos(request) and prompt[1:2].tolist() != [bos] for prompt in prompts]
                prompts = [prompt if added else prompt[1:] for prompt, added in zip(prompts, hidden_bos, strict=True)]
        else:
            self._inputs.check_token_count(sum(len(row) for row in request.prompt), "prompt")
            prompts = [self._inputs.token_array(row, "prompt") for row in request.prompt]
        keep = request.truncate_prompt_tokens
        if keep == 0:
            raise InvalidRequest("truncate_prompt_tokens must be -1 or >= 1, got 0", param="truncate_prompt_tokens")
        if keep is not None:
            most = self._info.context_length if keep == -1 else keep
            prompts = [
                end_of_context(prompt, most, self._info.bos_token_id if added else None)
                for prompt, added in zip(prompts, hidden_bos, strict=True)
            ]
        return prompts, hidden_bos

    def _puts_bos(self, request: CompletionRequest) -> bool:
        if request.add_bos is not None:
            return request.add_bos
        return request.add_special_tokens is not False and self._tokenizer.adds_bos


def _sampling(request: Sampled) -> SamplingOptions:
    return SamplingOptions(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=max(0, request.top_k or 0),
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=request.logit_bias or {},
    )


def _refuse_unserved(
    others: Mapping[str, object] | None, neutral: Mapping[str, tuple[object, ...]], where: str = ""
) -> None:
    for name, values in neutral.items():
        value = (others or {}).get(name)
        if value is not None and value not in values:
            raise InvalidRequest(f"{where}{name} is not served here: leave it out", param=f"{where}{name}")
