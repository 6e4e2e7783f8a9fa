"""Clients of a running system: Client, and AsyncClient for programs with an event loop.

Both have every function of routes.py as a method, described once there: `_Method` makes it a call that returns, or one
that is awaited. What differs between the two is how one request is sent.
"""

import asyncio
import copy
import math
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, Generic, ParamSpec, Self, TypeVar, overload

import httpx

from knnlm.clients import routes
from knnlm.clients.call import FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS, MIN_ATTEMPT_SECONDS
from knnlm.clients.events import EventReader
from knnlm.clients.http import KEEPALIVE_SECONDS, answered_json, outgoing_headers, translated, transport_error
from knnlm.clients.routes import Call, Streamed
from knnlm.errors import InvalidRequest, KnnlmError, Overloaded, Unavailable
from knnlm.transport.context import time_limit
from knnlm.transport.security import ApiKey, Tls

URL, API_KEY, ADMIN_API_KEY = "KNNLM_URL", "KNNLM_API_KEY", "KNNLM_ADMIN_API_KEY"  # variables of the environment
DEFAULT_URL = "http://127.0.0.1:8000"

Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)
Given = ParamSpec("Given")
Answer = TypeVar("Answer")


class _Method(Generic[Given, Answer]):
    """A route as a method: a Client's returns the answer, an AsyncClient's is awaited."""

    def __init__(self, route: Callable[Given, Call[Answer]]) -> None:
        self._route = route

    @overload
    def __get__(self, client: None, owner: type) -> Callable[Given, Call[Answer]]: ...
    @overload
    def __get__(self, client: "Client", owner: type) -> Callable[Given, Answer]: ...
    @overload
    def __get__(self, client: "AsyncClient", owner: type) -> Callable[Given, Awaitable[Answer]]: ...
    def __get__(self, client: "Client | AsyncClient | None", owner: type) -> Callable[Given, Any]:
        if client is None:
            return self._route
        send, route = client._send, self._route
        return wraps(route)(lambda *args, **kwargs: send(route(*args, **kwargs)))


class _Stream(Generic[Given, Answer]):
    """A route that streams as a method: a Client's is iterated, an AsyncClient's with `async for`."""

    def __init__(self, route: Callable[Given, Streamed[Answer]]) -> None:
        self._route = route

    @overload
    def __get__(self, client: None, owner: type) -> Callable[Given, Streamed[Answer]]: ...
    @overload
    def __get__(self, client: "Client", owner: type) -> Callable[Given, Iterator[Answer]]: ...
    @overload
    def __get__(self, client: "AsyncClient", owner: type) -> Callable[Given, AsyncIterator[Answer]]: ...
    def __get__(self, client: "Client | AsyncClient | None", owner: type) -> Callable[Given, Any]:
        if client is None:
            return self._route
        stream, route = client._stream, self._route
        return wraps(route)(lambda *args, **kwargs: stream(route(*args, **kwargs)))


class _Connection(Generic[Http]):
    """The aggregator at base_url: http://host:port or https://; else what KNNLM_URL says, else http://127.0.0.1:8000.

    api_key: the key, or a function that gives it for each call (a SecretFile); else what KNNLM_API_KEY says.
    admin_key: for activate, add_documents and remove_documents; else KNNLM_ADMIN_API_KEY, else api_key. timeout:
    seconds per call, all attempts included. wait: seconds for which a call is made again while the service does not
    answer, starts, or has a full queue; Retry-After is honoured. ca_file: PEM of the authorities that vouch for an
    https:// service, else those that the system trusts; cert_file, key_file: PEM of the client's own certificate.
    transport: of httpx, in tests.

    Every method raises the KnnlmError that the service raised, Unavailable when there is no service, DeadlineExceeded.
    A call that changes something is not made again once it may have begun.
    """

    _opened: ClassVar[Callable[..., Any]]  # Any: httpx.Client or httpx.AsyncClient

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: ApiKey = None,
        admin_key: ApiKey = None,
        timeout: float = 60.0,
        wait: float = 5.0,
        ca_file: Path | None = None,
        cert_file: Path | None = None,
        key_file: Path | None = None,
        transport: httpx.BaseTransport | httpx.AsyncBaseTransport | None = None,
    ) -> None:
        url = base_url or os.environ.get(URL) or DEFAULT_URL
        if not url.startswith(("http://", "https://")):
            raise InvalidRequest(f"base_url must begin with http:// or https://, got {url!r:.80}", param="base_url")
        tls = Tls.of(ca_file, cert_file, key_file)
        self._url = url.rstrip("/")
        self._key = api_key or os.environ.get(API_KEY)
        self._admin_key = admin_key or os.environ.get(ADMIN_API_KEY) or self._key
        self._timeout = _finite(timeout)
        self._wait = wait
        try:
            self._http: Http = self._opened(
                base_url=self._url,
                transport=transport,
                verify=True if tls is None else tls.ssl_context(),
                limits=httpx.Limits(keepalive_expiry=KEEPALIVE_SECONDS),
            )
        except httpx.InvalidURL as err:
            raise InvalidRequest(f"base_url must be a URL, got {url!r:.80}: {err}", param="base_url") from err

    def within(self, seconds: float) -> Self:
        """The same client with another timeout; it shares the connections, which are closed together."""
        other = copy.copy(self)
        other._timeout = _finite(seconds)
        return other

    next_token = _Method(routes.next_token)
    score = _Method(routes.score)
    explain = _Method(routes.explain)
    complete = _Method(routes.complete)
    stream = _Stream(routes.stream)
    chat = _Method(routes.chat)
    stream_chat = _Stream(routes.stream_chat)
    models = _Method(routes.models)
    model = _Method(routes.model)
    domains = _Method(routes.domains)
    domain = _Method(routes.domain)
    activate = _Method(routes.activate)
    add_documents = _Method(routes.add_documents)
    remove_documents = _Method(routes.remove_documents)
    tokenize = _Method(routes.tokenize)
    detokenize = _Method(routes.detokenize)
    tokenizer_info = _Method(routes.tokenizer_info)

    def _request(self, call: Call[Any], limit: float) -> httpx.Request:
        headers = {
            **outgoing_headers(self._admin_key if call.admin else self._key, limit),
            "content-type": "application/json",
        }
        content = call.content()
        return self._http.build_request(call.method, call.path, content=content, headers=headers, timeout=limit)

    def _attempts(self, call: Call[Any]) -> "_Attempts":
        return _Attempts(self._url, call, time_limit(self._timeout), self._wait)


class Client(_Connection[httpx.Client]):
    __doc__ = _Connection.__doc__
    _opened = httpx.Client

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _send(self, call: Call[Answer]) -> Answer:
        return call.read(answered_json(self._response(call)))

    def _stream(self, call: Streamed[Answer]) -> Iterator[Answer]:
        response = self._response(call)
        reader = EventReader(self._url)
        try:
            for chunk in response.iter_bytes():
                yield from map(call.read, reader.events(chunk))
            reader.check_complete()
        except httpx.TransportError as err:
            raise transport_error(err, self._url, self._timeout) from err
        finally:
            response.close()

    def _response(self, call: Call[Any]) -> httpx.Response:
        """A successful one, read unless it is a stream."""
        attempts = self._attempts(call)
        while True:
            failure: httpx.Response | httpx.TransportError
            try:
                request = self._request(call, attempts.limit())
                failure = self._http.send(request, stream=isinstance(call, Streamed))
                if failure.is_success:
                    return failure
                failure.read()
            except httpx.TransportError as err:
                failure = err
            time.sleep(attempts.pause_after(failure))


class AsyncClient(_Connection[httpx.AsyncClient]):
    __doc__ = _Connection.__doc__
    _opened = httpx.AsyncClient

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def _send(self, call: Call[Answer]) -> Answer:
        return call.read(answered_json(await self._response(call)))

    async def _stream(self, call: Streamed[Answer]) -> AsyncIterator[Answer]:
        response = await self._response(call)
        reader = EventReader(self._url)
        try:
            async for chunk in response.aiter_bytes():
                for event in reader.events(chunk):
                    yield call.read(event)
            reader.check_complete()
        except httpx.TransportError as err:
            raise transport_error(err, self._url, self._timeout) from err
        finally:
            await response.aclose()

    async def _response(self, call: Call[Any]) -> httpx.Response:
        """A successful one, read unless it is a stream."""
        attempts = self._attempts(call)
        while True:
            failure: httpx.Response | httpx.TransportError
            try:
                request = self._request(call, attempts.limit())
                failure = await self._http.send(request, stream=isinstance(call, Streamed))
                if failure.is_success:
                    return failure
                await failure.aread()
            except httpx.TransportError as err:
                failure = err
            await asyncio.sleep(attempts.pause_after(failure))


class _Attempts:
    """One call, however often it is made: how long it may take, and whether and when it is made again."""

    def __init__(self, where: str, call: Call[Any], timeout: float, wait: float) -> None:
        now = time.monotonic()
        self._where = where
        self._call = call
        self._timeout = timeout
        self._deadline = now + timeout
        self._until = min(now + wait, self._deadline - MIN_ATTEMPT_SECONDS)
        self._backoff = FIRST_BACKOFF_SECONDS

    def limit(self) -> float:
        """Seconds for the next attempt."""
        return max(self._deadline - time.monotonic(), MIN_ATTEMPT_SECONDS)

    def pause_after(self, failure: httpx.Response | httpx.TransportError) -> float:
        """Seconds until the call is made again. Raises what the failure means, when it is not."""
        error = self._error(failure)
        pause = self._backoff * random.uniform(0.5, 1.0)  # noqa: S311  so that clients do not come back together
        self._backoff = min(2 * self._backoff, MAX_BACKOFF_SECONDS)
        if isinstance(failure, httpx.Response):
            pause = max(pause, _seconds(failure.headers.get("retry-after", "")))
        if not self._may_repeat(failure, error) or time.monotonic() + pause > self._until:
            raise error from (failure if isinstance(failure, httpx.TransportError) else None)
        return pause

    def _error(self, failure: httpx.Response | httpx.TransportError) -> KnnlmError:
        if isinstance(failure, httpx.Response):
            return translated(failure)
        return transport_error(failure, self._where, self._timeout)

    def _may_repeat(self, failure: httpx.Response | httpx.TransportError, error: KnnlmError) -> bool:
        if isinstance(failure, httpx.ConnectError) or isinstance(error, Overloaded):
            return True  # nothing has begun
        return self._call.repeatable and isinstance(error, Unavailable)


def _seconds(retry_after: str) -> float:
    """0 for a date, which our services do not send."""
    try:
        return float(retry_after)
    except ValueError:
        return 0.0


def _finite(timeout: float) -> float:
    if not math.isfinite(timeout):
        raise InvalidRequest(f"timeout must be a finite number of seconds, got {timeout}", param="timeout")
    return timeout
