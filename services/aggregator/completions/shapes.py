"""Whole answers and chunks of streams in OpenAI's shapes, made of what choices give. Pure."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from knnlm.clients.explained import ExplainedToken
from knnlm.sources import Plan
from knnlm.tokenizer import Tokenizer
from knnlm.wire.jsonable import to_json
from services.aggregator.completions.choices import Listed, Piece
from services.aggregator.completions.reading import CheckedRequest
from services.aggregator.responses import used_domains, used_memories

LEAST = -9999.0  # what stands for minus infinity, which JSON cannot say: as in vLLM

Json = dict[str, Any]  # Any: JSON


@dataclass
class Gathered:
    """The pieces of one choice that have come so far."""

    texts: list[str] = field(default_factory=list)
    tokens: list[Listed] = field(default_factory=list)
    log_prob: float = 0.0  # that of all generated tokens together
    explained: list[ExplainedToken] = field(default_factory=list)
    generated: int = 0
    searches_skipped: int = 0
    finish: str | None = None
    stopped_at: str | int | None = None

    def add(self, piece: Piece) -> None:
        self.texts.append(piece.text)
        self.tokens += piece.tokens
        for listed in piece.tokens[len(piece.tokens) - piece.generated :]:
            self.log_prob += listed.log_prob or 0.0
        self.explained += [] if piece.explained is None else [piece.explained]
        self.generated += piece.generated
        self.searches_skipped += piece.searches_skipped
        self.finish, self.stopped_at = piece.finish, piece.stopped_at

    @property
    def mean_log_prob(self) -> float:
        return self.log_prob / self.generated if self.generated else 0.0


class Shape(ABC):
    """Makes the answer to one request. name: the model's, as the answer says it."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, checked: CheckedRequest, name: str, request_id: str, tokenizer: Tokenizer) -> None:
        self.checked = checked
        self._head = {"id": f"{self.prefix}-{request_id}", "created": int(time.time()), "model": name}
        self._tokenizer = tokenizer
        self._begun = False
        self._searches_skipped = 0  # in the pieces of a stream so far

    def whole(self, made: Sequence[Gathered], plan: Plan, degraded: str | None) -> Json:
        """The whole answer. made: all choices that were generated, the best of which are given."""
        per_prompt = [made[i : i + self.checked.made] for i in range(0, len(made), self.checked.made)]
        given = [one for choices in per_prompt for one in _best(choices, self.checked.n)]
        return {
            **self._head,
            "object": self.whole_object,
            "choices": [self._choice(index, one) for index, one in enumerate(given)],
            "usage": self.usage(sum(one.generated for one in made), sum(one.searches_skipped for one in made)),
            **_extras(plan, degraded),
        }

    def chunks(self, piece: Piece, plan: Plan, *, generated: int) -> Iterable[Json]:
        """Chunks that a piece adds to the stream. generated: tokens of all choices so far."""
        self._searches_skipped += piece.searches_skipped
        for part in self._parts(piece):
            extras = _extras(plan, piece.degraded)
            if self._begun:
                extras = {"degraded": extras["degraded"]}
                if piece.degraded is None:
                    extras.pop("degraded")
            self._begun = True
            chunk = {**self._head, "object": self.chunk_object, "choices": [part], **extras}
            if self.checked.include_usage:
                chunk["usage"] = self.usage(generated, self._searches_skipped) if self.checked.usage_in_all else None
            yield chunk

    def closing(self, generated: int) -> Iterable[Json]:
        """Chunks after the last piece."""
        if self.checked.include_usage:
            yield {
                **self._head,
                "object": self.chunk_object,
                "choices": [],
                "usage": self.usage(generated, self._searches_skipped),
            }

    def usage(self, generated: int, searches_skipped: int) -> Json:
        prompt = self.checked.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "searches_skipped": searches_skipped,
        }

    def _choice(self, index: int, one: Gathered) -> Json:
        return {
            "index": index,
            **self._text("".join(one.texts)),
            "logprobs": self._logprobs(one.tokens),
            "finish_reason": one.finish,
            "stop_reason": one.stopped_at,
            **self._explained(one.explained),
        }

    def _shown(self, piece: Piece) -> bool:
        """Whether a piece that does not end a choice has anything that is shown."""
        return bool(piece.text) or self.checked.explain or self.checked.logprobs is not None

    @abstractmethod
    def _text(self, text: str) -> Json:
        """The field that holds the text of a whole choice."""

    @abstractmethod
    def _parts(self, piece: Piece) -> Iterable[Json]:
        """Elements of `choices` for one piece, each of which is sent in a chunk of its own."""

    @abstractmethod
    def _logprobs(self, tokens: Sequence[Listed]) -> Json | None:
        """Log-probabilities of the tokens, None where they were not asked for."""

    def _explained(self, tokens: Sequence[ExplainedToken]) -> Json:
        return {"explained": [to_json(token) for token in tokens]} if self.checked.explain else {}

    def _name(self, token: int, text: str) -> str:
        return f"token_id:{token}" if self.checked.as_ids else text


class CompletionShape(Shape):
    """Answers of /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _text(self, text: str) -> Json:
        return {"text": text}

    def _parts(self, piece: Piece) -> Iterable[Json]:
        if self._begun and not piece.finish and not self._shown(piece):
            return
        yield {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": piece.finish,
            "stop_reason": piece.stopped_at,
            **self._explained([] if piece.explained is None else [piece.explained]),
        }

    def _logprobs(self, tokens: Sequence[Listed]) -> Json | None:
        if self.checked.logprobs is None:
            return None
        return {
            "tokens": [self._name(one.token, one.text) for one in tokens],
            "token_logprobs": [None if one.log_prob is None else finite(one.log_prob) for one in tokens],
            "top_logprobs": [self._likeliest(one) for one in tokens],
            "text_offset": [one.offset for one in tokens],
        }

    def _likeliest(self, one: Listed) -> dict[str, float] | None:
        """Log-probabilities of the token itself and of the likeliest; of several with the same text, the largest."""
        if one.log_prob is None:
            return None
        found = {self._name(one.token, one.text): finite(one.log_prob)}
        for token, log_prob in one.top:
            name = self._name(token, one.text if token == one.token else self._tokenizer.token(token))
            found[name] = max(finite(log_prob), found.get(name, LEAST))
        return found


class ChatShape(Shape):
    """Answers of /v1/chat/completions. In a stream, every choice begins with its role and ends with a chunk without
    text."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, checked: CheckedRequest, name: str, request_id: str, tokenizer: Tokenizer) -> None:
        super().__init__(checked, name, request_id, tokenizer)
        self._opened: set[int] = set()

    def _text(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text}}

    def _parts(self, piece: Piece) -> Iterable[Json]:
        open_end = {"logprobs": None, "finish_reason": None, "stop_reason": None}
        if piece.index not in self._opened:
            self._opened.add(piece.index)
            yield {"index": piece.index, "delta": {"role": "assistant", "content": ""}, **open_end}
        if self._shown(piece) and (piece.text or piece.tokens):
            yield {
                "index": piece.index,
                "delta": {"content": piece.text},
                **open_end,
                "logprobs": self._logprobs(piece.tokens),
                **self._explained([] if piece.explained is None else [piece.explained]),
            }
        if piece.finish is not None:
            ended = {"finish_reason": piece.finish, "stop_reason": piece.stopped_at}
            yield {"index": piece.index, "delta": {}, **open_end, **ended}

    def _logprobs(self, tokens: Sequence[Listed]) -> Json | None:
        if self.checked.logprobs is None:
            return None
        return {
            "content": [
                {
                    **self._likely(one.token, one.text, one.log_prob),
                    "top_logprobs": [
                        self._likely(token, self._tokenizer.token(token), log_prob) for token, log_prob in one.top
                    ],
                }
                for one in tokens
            ]
        }

    def _likely(self, token: int, text: str, log_prob: float | None) -> Json:
        return {
            "token": self._name(token, text),
            "logprob": LEAST if log_prob is None else finite(log_prob),
            "bytes": list(self._tokenizer.token_bytes(token)),
        }


def finite(value: float) -> float:
    return value if math.isfinite(value) else LEAST


def _best(made: Sequence[Gathered], n: int) -> Sequence[Gathered]:
    return made if len(made) == n else sorted(made, key=lambda one: -one.mean_log_prob)[:n]


def _extras(plan: Plan, degraded: str | None) -> Json:
    domains = [used.model_dump(by_alias=True) for used in used_domains(plan)]
    memories = [used.model_dump(by_alias=True) for used in used_memories(plan)]
    return {"domains": domains, "memories": memories, "degraded": degraded}
