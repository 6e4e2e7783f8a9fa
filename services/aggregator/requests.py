"""What a request gives, within the settings: texts and token ids as arrays of token ids; and the memory that the
distributions of all requests share."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from knnlm.cache_source import DEFAULT_SIZE
from knnlm.decoding import end_of_context
from knnlm.errors import DeadlineExceeded, InvalidRequest, TooLarge
from knnlm.messages import ModelInfo
from knnlm.tokenizer import Tokenizer
from services.aggregator.schemas import mixing
from services.aggregator.schemas.explaining import ExplainRequest
from services.aggregator.settings import AggregatorSettings

Ids = npt.NDArray[np.int32]
KEPT_PLACES = 2  # rows that a cache has room for, for each place that it looks at
KEY_BYTES = 4  # bytes of a number of a key


class Inputs:
    """Reads and checks what requests give. param: the field that errors name.

    Texts are (t,) int32 arrays of token ids, with the BOS that the tokenizer puts before them; token ids are used as
    they are.
    """

    def __init__(self, info: ModelInfo, tokenizer: Tokenizer, settings: AggregatorSettings) -> None:
        self._info = info
        self._tokenizer = tokenizer
        self._settings = settings

    async def contexts(
        self,
        texts: str | Sequence[str] | None,
        rows: Sequence[Sequence[int]] | None,
        *,
        parse_special: bool,
        params: tuple[str, str] = ("text", "tokens"),
    ) -> list[Ids]:
        """One array for each text or each row of token ids, of which one kind is given; see `fitting`.

        params: the fields of the two. Raises InvalidRequest and TooLarge.
        """
        _one_of_two(texts, rows, params)
        if texts is None:
            rows = rows or []
            self._check_count(len(rows), params[1])
            return [self.token_array(row, params[1]) for row in rows]
        texts = [texts] if isinstance(texts, str) else texts
        self._check_count(len(texts), params[0])
        self.check_texts(texts, params[0])
        return await asyncio.to_thread(self._tokenizer.encode_all, list(texts), parse_special=parse_special)

    async def encoded(self, texts: Sequence[str], param: str) -> list[Ids]:
        """Each text with its BOS; special tokens that are written in it count as such. Raises as `contexts`."""
        self.check_texts(texts, param)
        return await asyncio.to_thread(self._tokenizer.encode_all, list(texts), parse_special=True)

    async def one_text(self, text: str | None, tokens: Sequence[int] | None, *, parse_special: bool) -> Ids:
        """A text to be scored, of any length up to max_score_tokens. Raises InvalidRequest and TooLarge."""
        _one_of_two(text, tokens, ("text", "tokens"))
        if text is None:
            ids = self.token_array(tokens or [])
        else:
            self.check_texts([text], "text")
            ids = await asyncio.to_thread(self._tokenizer.encode, text, parse_special=parse_special)
        self._check_length(ids)
        return ids

    async def explained(self, request: ExplainRequest) -> tuple[Ids, int]:
        """The tokens of a text, and the place of the first that is explained. Raises InvalidRequest and TooLarge."""
        prompt, completion = request.prompt, request.completion
        first = 1
        if prompt is None and completion is None:
            ids = await self.one_text(request.text, request.tokens, parse_special=request.parse_special)
        elif request.text is not None or request.tokens is not None:
            raise InvalidRequest(f"give either {request.given} or prompt and completion", param=request.given)
        elif isinstance(prompt, str) and isinstance(completion, str):
            self.check_texts([completion], "completion")
            self.check_texts([prompt, completion], "prompt", empty=True)
            ids, first = await asyncio.to_thread(
                self._tokenizer.continued, prompt, completion, parse_special=request.parse_special
            )
        elif isinstance(prompt, list) and isinstance(completion, list):
            ids = np.concatenate([self.token_array(prompt, "prompt"), self.token_array(completion, "completion")])
            first = len(prompt)
        else:
            raise InvalidRequest(
                "prompt and completion must be given together, both as texts or both as token ids",
                param="prompt" if prompt is None else "completion",
            )
        self._check_length(ids)
        self._check_explained(request, len(ids) - first)
        return ids, first

    def _check_length(self, ids: Ids) -> None:
        if len(ids) > self._settings.max_score_tokens:
            raise TooLarge(
                f"the text has {len(ids)} tokens, at most {self._settings.max_score_tokens} are scored at once",
                param="text",
            )

    def _check_explained(self, request: ExplainRequest, tokens: int) -> None:
        """Raises TooLarge for more passages than are shown."""
        for name in ("passages", "passage_tokens"):
            if getattr(request, name) > self._settings.max_neighbors:
                raise TooLarge(
                    f"{name} must be at most {self._settings.max_neighbors}, got {getattr(request, name)}", param=name
                )
        most = self._settings.max_explained_passages
        if tokens * max(1, request.passages) > most:
            raise TooLarge(
                f"{tokens} tokens with {request.passages} passages each were asked for, at most {most} passages are "
                "shown (--max-explained-passages): explain a shorter text, or ask for fewer",
                param="text" if tokens > most else "passages",
            )

    def fitting(self, context: Ids, truncate: str | None, param: str) -> Ids:
        """The context, or with `truncate` its BOS and as much of its end as the model takes. Raises TooLarge."""
        most = min(self._info.context_length, self._settings.max_context_length)
        if len(context) <= most:
            return context
        if truncate is None:
            raise TooLarge(
                f'a context has {len(context)} tokens, at most {most} are taken; truncate "left" keeps its end',
                param=param,
            )
        return end_of_context(context, most, self._info.bos_token_id)

    def distribution_numbers(self, contexts: int, param: str) -> int:
        """Numbers in the distributions of one token after each context. Raises TooLarge, before any work."""
        most, numbers = self._settings.max_distribution_numbers, contexts * self._info.vocab_size
        if numbers > most:
            raise TooLarge(
                f"{contexts} contexts have distributions over {self._info.vocab_size} tokens each, {numbers} numbers; "
                f"at most {most} are made for one request: ask for fewer contexts",
                param=param,
            )
        return numbers

    def check_shown(self, request: mixing.NextTokenRequest, *, retrieved: bool) -> None:
        """Raises TooLarge, and InvalidRequest for neighbors where nothing is retrieved."""
        limits = self._settings
        for name, most in (
            ("top_n", limits.max_top_n),
            ("neighbors", limits.max_neighbors),
            ("neighbor_tokens", limits.max_neighbors),
        ):
            if getattr(request, name) > most:
                raise TooLarge(f"{name} must be at most {most}, got {getattr(request, name)}", param=name)
        if request.neighbors and not retrieved:
            raise InvalidRequest("neighbors were asked for, but no domain is named in knn or model", param="neighbors")

    def check_texts(self, texts: Sequence[str], param: str, *, empty: bool = False) -> None:
        """empty: whether a text may be. Raises InvalidRequest, and TooLarge for more bytes than are tokenized here."""
        if not (all(texts) or empty):
            raise InvalidRequest(f"{param} must not be empty", param=param)
        size, most = sum(len(text.encode()) for text in texts), self._settings.max_text_bytes
        if size > most:
            raise TooLarge(f"{param} may have {most} bytes, got {size} (--max-text-bytes)", param=param)

    def check_token_count(self, count: int, param: str = "tokens") -> None:
        """Raises TooLarge for more token ids than any request may hold."""
        most = self._settings.max_score_tokens
        if count > most:
            raise TooLarge(f"{param} may hold {most} token ids, got {count} (--max-score-tokens)", param=param)

    def token_array(self, tokens: Sequence[int], param: str = "tokens") -> Ids:
        """Raises InvalidRequest for a token id that the model does not know."""
        largest = max(tokens, default=0)
        if largest >= self._info.vocab_size:
            raise InvalidRequest(f"token {largest} is outside the vocabulary of {self._info.vocab_size}", param=param)
        return np.array(tokens, np.int32)

    def _check_count(self, count: int, param: str) -> None:
        if not count:
            raise InvalidRequest(f"{param} is empty: expected at least one context", param=param)
        if count > self._settings.max_texts:
            raise TooLarge(f"{param} may hold {self._settings.max_texts} contexts, got {count}", param=param)


def _one_of_two(texts: object, tokens: object, params: tuple[str, str]) -> None:
    if (texts is None) == (tokens is None):
        raise InvalidRequest(f"give either {params[0]} or {params[1]}", param=params[0])


class MemoryBudget:
    """Bounds the numbers that requests hold in memory together. Requests wait in the order of their arrival."""

    def __init__(self, size: int, what: str = "memory for its distributions was free") -> None:
        """what: for which a request waits, in the error of one that waited too long."""
        self._left = size
        self._what = what
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def hold(self, size: int, seconds: float) -> AsyncIterator[None]:
        """size: at most that of the budget. Raises DeadlineExceeded when it is not free within `seconds`."""
        try:
            async with asyncio.timeout(seconds), self._turn:
                while self._left < size:
                    self._freed.clear()
                    await self._freed.wait()
                self._left -= size
        except TimeoutError as err:
            raise DeadlineExceeded(f"the request's time was over before {self._what}") from err
        try:
            yield
        finally:
            self._left += size
            self._freed.set()


class CacheMemory:
    """The memory that the caches of all texts under way share (--max-cache-bytes)."""

    def __init__(self, key_dim: int, settings: AggregatorSettings) -> None:
        self._place_bytes = KEPT_PLACES * KEY_BYTES * key_dim
        self._most = settings.max_cache_bytes
        self._budget = MemoryBudget(self._most, "memory for its cache was free (--max-cache-bytes)")

    def hold(
        self,
        sources: Mapping[str, Any],  # Any: a record of options for each row of knnlm.sources.SOURCES
        texts: int,
        seconds: float,
    ) -> AbstractAsyncContextManager[None]:
        """Room for the caches of `texts` texts; nothing where these sources have none. Raises TooLarge for more than
        there ever is, and DeadlineExceeded when it is not free within `seconds`."""
        options = sources.get("cache")
        if options is None:
            return nullcontext()
        size = texts * self._place_bytes * (options.size or options.max_size or DEFAULT_SIZE)
        if size > self._most:
            raise TooLarge(
                f"the caches of {texts} texts need {size} bytes, at most {self._most} are held (--max-cache-bytes): "
                "ask for a smaller size, or for fewer texts",
                param="cache.size",
            )
        return self._budget.hold(size, seconds)
