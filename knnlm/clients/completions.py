"""Completions as the aggregator answers them, whole and in parts: records of its JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from knnlm.clients.answers import UsedDomain, UsedMemory
from knnlm.clients.explained import ExplainedToken


@dataclass(frozen=True)
class Logprobs:
    """Lists with one element for each token: with `echo` the prompt's tokens stand before the others, and the first has
    None for its log-probability. text_offset: characters of the choice's text before that of the token."""

    tokens: Sequence[str]
    token_logprobs: Sequence[float | None]
    top_logprobs: Sequence[Mapping[str, float] | None] | None
    text_offset: Sequence[int]


@dataclass(frozen=True)
class Choice:
    """One generated text, or a part of it. finish_reason: "stop", "length", or None where more follows. stop_reason:
    the stop text or token it ended at. explained: what made each token, where `knn` has `explain`."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    explained: Sequence[ExplainedToken] | None = None


@dataclass(frozen=True)
class Usage:
    """searches_skipped: tokens for which nothing was searched, over all domains."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    searches_skipped: int = 0


@dataclass(frozen=True)
class Completion:
    """An answer, or one part of a stream, which holds new text of one choice. domains: in a stream, in its first part
    alone."""

    id: str
    created: int
    model: str
    choices: Sequence[Choice]
    usage: Usage | None = None
    domains: Sequence[UsedDomain] = ()
    degraded: str | None = None
    memories: Sequence[UsedMemory] = ()


@dataclass(frozen=True)
class LikelyToken:
    """A token with its log-probability, in nats. bytes: what it stands for, which need not be whole characters."""

    token: str
    logprob: float
    bytes: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class ChatToken(LikelyToken):
    top_logprobs: Sequence[LikelyToken]


@dataclass(frozen=True)
class ChatLogprobs:
    content: Sequence[ChatToken]


@dataclass(frozen=True)
class Message:
    """A message; in a stream its new text alone."""

    role: str | None = None
    content: str | None = None


@dataclass(frozen=True)
class ChatChoice:
    """One generated message. message: in a whole answer. delta: in a stream. The others are those of a Choice."""

    index: int
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    message: Message | None = None
    delta: Message | None = None
    explained: Sequence[ExplainedToken] | None = None

    @property
    def text(self) -> str:
        """Text of the message; in a stream its new text."""
        said = self.message or self.delta
        return "" if said is None else said.content or ""


@dataclass(frozen=True)
class ChatCompletion:
    """A Completion whose choices are messages."""

    id: str
    created: int
    model: str
    choices: Sequence[ChatChoice]
    usage: Usage | None = None
    domains: Sequence[UsedDomain] = ()
    degraded: str | None = None
    memories: Sequence[UsedMemory] = ()
