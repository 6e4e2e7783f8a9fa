"""The aggregator's routes as data: each function sends nothing and returns the Call to make.

Client and AsyncClient (aggregator.py) have each of them as a method. What is None is left out of the request, and the
service's default holds. `more`: further fields of the request, by their names in docs/api.md.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar

from knnlm.clients import answers
from knnlm.clients.completions import ChatCompletion, Completion
from knnlm.clients.explained import Explained
from knnlm.clients.http import quoted
from knnlm.errors import InvalidRequest, KnnlmError
from knnlm.messages import Document, DomainChange, DomainInfo
from knnlm.options import CacheOptions, KnnOptions, MemoryOptions, ReuseOptions
from knnlm.wire.jsonable import from_json, to_json

Answer = TypeVar("Answer")
Record = TypeVar("Record")
Given = ParamSpec("Given")
Json: TypeAlias = Mapping[str, Any]  # Any: what json.loads gives
Knn: TypeAlias = KnnOptions | Mapping[str, object]
Memory: TypeAlias = MemoryOptions | Mapping[str, object] | str  # a name alone: with its fitted weight
Texts: TypeAlias = str | Sequence[str]
TokenIds: TypeAlias = Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """One request. read: makes the answer of its JSON, or of each event of a stream. admin: needs the admin key.

    repeatable: does no harm when it is made twice, so that it may be made again although it may have begun.
    """

    method: str
    path: str
    read: Callable[[Json], Answer]
    body: Json | None = None
    admin: bool = False
    repeatable: bool = True

    def content(self) -> bytes | None:
        """The body as JSON. Raises InvalidRequest for what JSON cannot hold."""
        if self.body is None:
            return None
        try:
            return json.dumps(self.body, allow_nan=False).encode()
        except (TypeError, ValueError) as err:
            raise InvalidRequest(f"the request cannot be written as JSON: {err}") from err


@dataclass(frozen=True)
class Streamed(Call[Answer]):
    """A request that is answered by a stream of events."""


def next_token(
    text: Texts | None = None,
    *,
    tokens: TokenIds | None = None,
    model: str | None = None,
    knn: Knn | None = None,
    memory: Memory | None = None,
    top_n: int | None = None,
    full: bool = False,
    neighbors: int | None = None,
    **more: object,
) -> Call[answers.NextTokens]:
    """The mixture's likeliest tokens after each context; full: also the whole distribution, as arrays."""
    shown = {"full": True, "encoding": "base64"} if full else {}
    body = _body(knn, memory, text=text, tokens=tokens, model=model, top_n=top_n, neighbors=neighbors, **shown, **more)
    return Call("POST", "/v1/next_token", _of(answers.NextTokens), body)


def score(
    text: str | None = None,
    *,
    tokens: Sequence[int] | None = None,
    model: str | None = None,
    knn: Knn | None = None,
    memory: Memory | None = None,
    **more: object,
) -> Call[answers.Scored]:
    """The log-probability of every token of a text of any length."""
    body = _body(knn, memory, text=text, tokens=tokens, model=model, **more)
    return Call("POST", "/v1/score", _of(answers.Scored), body)


def explain(
    text: str | None = None,
    *,
    tokens: Sequence[int] | None = None,
    prompt: str | Sequence[int] | None = None,
    completion: str | Sequence[int] | None = None,
    model: str | None = None,
    knn: Knn | None = None,
    memory: Memory | None = None,
    passages: int | None = None,
    passage_tokens: int | None = None,
    **more: object,
) -> Call[Explained]:
    """Where the probability of each token of a text, or of a completion after its prompt, comes from."""
    shown = {"passages": passages, "passage_tokens": passage_tokens}
    body = _body(
        knn, memory, text=text, tokens=tokens, prompt=prompt, completion=completion, model=model, **shown, **more
    )
    return Call("POST", "/v1/explain", _of(Explained), body)


def complete(
    prompt: Texts | TokenIds,
    *,
    model: str | None = None,
    knn: Knn | None = None,
    memory: Memory | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    stop: Texts | None = None,
    seed: int | None = None,
    n: int | None = None,
    echo: bool | None = None,
    logprobs: int | None = None,
    **more: object,
) -> Call[Completion]:
    """How each prompt goes on: n choices of each, in the prompts' order."""
    sampled = {"temperature": temperature, "top_p": top_p, "stop": stop, "seed": seed, "n": n}
    body = _body(
        knn, memory, prompt=prompt, model=model, max_tokens=max_tokens, echo=echo, logprobs=logprobs, **sampled, **more
    )
    return Call("POST", "/v1/completions", _of(Completion), body)


def chat(
    messages: Sequence[Json],
    *,
    model: str | None = None,
    knn: Knn | None = None,
    memory: Memory | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    stop: Texts | None = None,
    seed: int | None = None,
    n: int | None = None,
    logprobs: bool | None = None,
    top_logprobs: int | None = None,
    **more: object,
) -> Call[ChatCompletion]:
    """What the assistant says next: n choices. messages: each with `role` and `content`. Raises InvalidRequest where
    the model has no chat template."""
    sampled = {"temperature": temperature, "top_p": top_p, "stop": stop, "seed": seed, "n": n}
    shown = {"logprobs": logprobs, "top_logprobs": top_logprobs}
    body = _body(knn, memory, messages=messages, model=model, max_tokens=max_tokens, **sampled, **shown, **more)
    return Call("POST", "/v1/chat/completions", _of(ChatCompletion), body)


def _streamed(route: Callable[Given, Call[Answer]]) -> Callable[Given, Streamed[Answer]]:
    """The route with its answer in parts, as they come."""

    @wraps(route)
    def streamed(*args: Given.args, **kwargs: Given.kwargs) -> Streamed[Answer]:
        call = route(*args, **kwargs)
        return Streamed(call.method, call.path, call.read, {**(call.body or {}), "stream": True})

    return streamed


stream = _streamed(complete)
stream_chat = _streamed(chat)


def models() -> Call[Sequence[answers.Model]]:
    """The LM, and the LM with each of the domains."""
    return Call("GET", "/v1/models", lambda given: _of(answers.ModelList)(given).data)


def model(model: str) -> Call[answers.Model]:
    """One model of `models`, by its id."""
    return Call("GET", f"/v1/models/{quoted(model, 'model')}", _of(answers.Model))


def domains() -> Call[Sequence[DomainInfo]]:
    """Every domain with its versions and tuning."""
    return Call("GET", "/v1/domains", lambda given: _of(answers.DomainList)(given).domains)


def domain(domain: str) -> Call[answers.DomainStatus]:
    """One domain, and each replica's version of it."""
    return Call("GET", _domain(domain), _of(answers.DomainStatus))


def activate(domain: str, version: str, *, wait: bool = False) -> Call[DomainInfo]:
    """Switch a domain to another version (admin key). wait: return when every replica that serves the domain has
    switched; DeadlineExceeded names those that are late, and they go on."""
    body = {"version": version, "wait": wait}
    return Call("POST", f"{_domain(domain)}:activate", _of(DomainInfo), body, admin=True, repeatable=False)


def add_documents(domain: str, documents: Sequence[Document], *, replace: bool = False) -> Call[DomainChange]:
    """Add documents to a domain while it answers (admin key). replace: remove those that have the ids, instead of
    raising Conflict."""
    body = {"documents": [to_json(document) for document in documents], "replace": replace}
    return Call("POST", f"{_domain(domain)}/documents", _of(DomainChange), body, admin=True, repeatable=False)


def remove_documents(domain: str, ids: Sequence[str]) -> Call[DomainChange]:
    """Remove documents from a domain by their ids (admin key). Raises NotFound when one is no document."""
    path = f"{_domain(domain)}/documents:remove"
    return Call("POST", path, _of(DomainChange), {"ids": list(ids)}, admin=True, repeatable=False)


def tokenize(
    prompt: str, *, add_special_tokens: bool | None = None, return_token_strs: bool | None = None, **more: object
) -> Call[answers.Tokenized]:
    """Text to token ids."""
    shown = {"add_special_tokens": add_special_tokens, "return_token_strs": return_token_strs}
    return Call("POST", "/v1/tokenize", _of(answers.Tokenized), _body(None, None, prompt=prompt, **shown, **more))


def detokenize(tokens: Sequence[int]) -> Call[str]:
    """Token ids to text."""
    body = _body(None, None, tokens=tokens)
    return Call("POST", "/v1/detokenize", lambda given: _of(answers.Detokenized)(given).prompt, body)


def tokenizer_info() -> Call[Json]:
    """What the tokenizer is: special tokens, size, sha256."""
    return Call("GET", "/v1/tokenizer_info", dict)


def _of(record: type[Record]) -> Callable[[Json], Record]:
    def read(given: Json) -> Record:
        try:
            return from_json(record, given)
        except InvalidRequest as err:  # not the caller's fault
            raise KnnlmError(f"the service answered something else than {record.__name__}: {err.message}") from err

    return read


def _body(knn: Knn | None, memory: Memory | None, **fields: object) -> Json:
    given = {name: value for name, value in fields.items() if value is not None}
    if isinstance(cache := given.get("cache"), CacheOptions):
        given["cache"] = {name: value for name, value in to_json(cache).items() if value is not None}
    if memory is not None:
        asked = MemoryOptions(memory) if isinstance(memory, str) else memory
        options = to_json(asked) if isinstance(asked, MemoryOptions) else asked
        given["memory"] = {name: value for name, value in options.items() if value is not None}
    if isinstance(knn, KnnOptions):
        given |= {"knn": _knn_json(knn), "on_datastore_error": knn.on_datastore_error}
    elif knn is not None:
        given["knn"] = dict(knn)
    return given


def _knn_json(knn: KnnOptions) -> Json:
    """The options as a request has them."""
    chosen = [{name: value for name, value in to_json(d).items() if value is not None} for d in knn.domains]
    rule = {} if knn.rule is None else {"rule": knn.rule}
    used = {name: value for name, value in to_json(knn.reuse).items() if value is not None}
    reuse = {"reuse": used} if knn.reuse != ReuseOptions() else {}
    return {"domains": chosen, "combine": knn.combine, **rule, **reuse, **to_json(knn.search)}


def _domain(name: str) -> str:
    return f"/v1/domains/{quoted(name, 'domain')}"
