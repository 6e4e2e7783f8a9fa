"""A language model behind a client, as an encoder of keys: for threads that may block, such as a build.

One request is answered before the next is sent. What one answer may hold is bounded, here and by settings of
the lm service, so a request for more is sent in parts.
"""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import numpy as np

from knnlm.errors import InvalidRequest, TooLarge, Unavailable
from knnlm.messages import ForwardRequest, ForwardResult, ModelInfo
from knnlm.protocols import LanguageModelClient
from knnlm.tokenizer import Tokenizer

MAX_ANSWER_BYTES = 8 << 20  # keys in one answer, four bytes a number: packing them holds up the lm service
MAX_REQUEST_TOKENS = 65_536  # an lm service takes as many unless its settings say otherwise

Answer = TypeVar("Answer")


@runtime_checkable
class _Closing(Protocol):
    async def aclose(self) -> None: ...


@lru_cache(maxsize=2)
def _tokenizer(json: str, bos_token_id: int | None, eos_token_id: int | None) -> Tokenizer:
    """The same one again for the next encoder: reading a large vocabulary holds up every other thread."""
    return Tokenizer(json, bos_token_id=bos_token_id, eos_token_id=eos_token_id)


class RemoteEncoder:
    """Keeps the LanguageModel protocol of knnlm.messages over `client`, for keys alone.

    loop: a running event loop of another thread, to which the client belongs; None: a loop of its own, in a thread that
    `close` ends. The client is then used in that loop alone, and `close` closes it. Not for the thread of the loop.

    Every method raises what the client raises; Unavailable when the model is no longer that of `info`.
    """

    def __init__(self, client: LanguageModelClient, *, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._client = client
        self._own: _LoopThread | None = None
        if loop is None:
            self._own = _LoopThread()
            loop = self._own.loop
        self._loop = loop
        try:
            self.info: ModelInfo = self._wait(client.get_model())
            self.tokenizer = _tokenizer(
                self._wait(client.get_tokenizer()), self.info.bos_token_id, self.info.eos_token_id
            )
        except BaseException:
            self.close()
            raise

    def forward(self, request: ForwardRequest) -> ForwardResult:
        """The keys. Raises InvalidRequest for a request that asks for anything else."""
        if not request.keys or any(replace(request, keys=False).wanted):
            raise InvalidRequest("an encoder gives keys and nothing else: expected keys alone", param="keys")
        results = list(self._parts(request))
        keys = [result.keys for result in results if result.keys is not None]
        return replace(results[0], keys=np.concatenate(keys))

    def close(self) -> None:
        """Close the client and end its thread, if they are ours. Harmless when repeated."""
        own, self._own = self._own, None
        if own is None:
            return
        try:
            if isinstance(self._client, _Closing):
                self._wait(self._client.aclose())
        finally:
            own.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _parts(self, request: ForwardRequest) -> Iterator[ForwardResult]:
        """Answers whose rows, one below the other, are those of the request."""
        rows, tokens = sum(len(p) for p in request.positions), sum(len(t) for t in request.tokens)
        halves = _halves(request)
        if halves and (4 * rows * self.info.key_dim > MAX_ANSWER_BYTES or max(rows, tokens) > MAX_REQUEST_TOKENS):
            for half in halves:
                yield from self._parts(half)
            return
        try:
            result = self._wait(self._client.forward(request))
        except TooLarge:  # a service with smaller limits than ours
            if not halves:
                raise
            for half in halves:
                yield from self._parts(half)
            return
        if result.fingerprint != self.info.fingerprint:
            raise Unavailable(
                f"the lm service has another model now: model {self.info.model_id} has fingerprint "
                f"{self.info.fingerprint}, the answer {result.fingerprint}"
            )
        yield result

    def _wait(self, call: Coroutine[Any, Any, Answer]) -> Answer:  # Any: what a coroutine is sent, which is nothing
        future = asyncio.run_coroutine_threadsafe(call, self._loop)  # it sees the context of this thread
        try:
            return future.result()
        except BaseException:  # Ctrl-C: nobody waits for the answer
            future.cancel()
            raise


class _LoopThread:
    """An event loop that runs in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="encoder", daemon=True)
        self._thread.start()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.loop.shutdown_default_executor(), self.loop).result()  # looks up names
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def _halves(request: ForwardRequest) -> tuple[ForwardRequest, ForwardRequest] | None:
    """Half of the sequences each, or of the positions of a single one; None when there is nothing to part."""
    tokens, positions = request.tokens, request.positions
    if len(tokens) > 1:
        at = len(tokens) // 2
        return (
            replace(request, tokens=tokens[:at], positions=positions[:at]),
            replace(request, tokens=tokens[at:], positions=positions[at:]),
        )
    if len(positions) == 1 and len(positions[0]) > 1:
        at = len(positions[0]) // 2
        return (
            replace(request, positions=[positions[0][:at]]),
            replace(request, positions=[positions[0][at:]]),
        )
    return None
