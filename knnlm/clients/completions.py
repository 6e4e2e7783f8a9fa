"""Completions as the aggregator answers them, whole and in parts: records of its JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from knnlm.clients.answers import UsedDomain
from knnlm.clients.explained import ExplainedToken


@dataclass(frozen=True)
class Logprobs:
    """One element for each token, the prompt's first with `echo`; the first of all has None. text_offset: where the
    token's text begins in the choice's, in characters."""

    tokens: Sequence[str]
    token_logprobs: Sequence[float | None]
    top_logprobs: Sequence[Mapping[str, float] | None] | None
    text_offset: Sequence[int]


@dataclass(frozen=True)
class Choice:
    """finish_reason: "stop", "length", or None where more follows. stop_reason: the stop text or token it ended at.
    explained: each token, where `knn` has `explain`."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    explained: Sequence[ExplainedToken] | None = None


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True)
class Completion:
    """Generated texts; of a stream, what came now of one of them. domains: of a stream in its first part alone."""

    id: str
    created: int
    model: str
    choices: Sequence[Choice]
    usage: Usage | None = None
    domains: Sequence[UsedDomain] = ()
    degraded: str | None = None


@dataclass(frozen=True)
class LikelyToken:
    """bytes: what the token stands for, which need not be whole characters."""

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
    """What was said; in a stream what it has more of now."""

    role: str | None = None
    content: str | None = None


@dataclass(frozen=True)
class ChatChoice:
    """message: in a whole answer. delta: in a stream. The others as in a Choice."""

    index: int
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    message: Message | None = None
    delta: Message | None = None
    explained: Sequence[ExplainedToken] | None = None

    @property
    def text(self) -> str:
        """The message's, or what a stream has more of now."""
        said = self.message or self.delta
        return "" if said is None else said.content or ""


@dataclass(frozen=True)
class ChatCompletion:
    """As Completion, with messages."""

    id: str
    created: int
    model: str
    choices: Sequence[ChatChoice]
    usage: Usage | None = None
    domains: Sequence[UsedDomain] = ()
    degraded: str | None = None
