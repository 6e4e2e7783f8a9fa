"""The services over HTTP, for where gRPC cannot go: the same messages as protobuf, or as JSON.

What holds arrays, Forward, Search and GetPassages, is sent and answered as its encoding says; all else is JSON.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from google.protobuf.message import DecodeError, Message

from knnlm.clients.failures import rebuild
from knnlm.errors import DeadlineExceeded, InvalidRequest, KnnlmError, Unavailable
from knnlm.messages import (
    Document,
    DomainChange,
    DomainInfo,
    ForwardRequest,
    ForwardResult,
    ModelInfo,
    Passage,
    PassagesRequest,
    PassagesResult,
    SearchRequest,
    SearchResult,
)
from knnlm.transport.context import outgoing_id, outgoing_metadata, time_limit
from knnlm.transport.security import ApiKey, Tls, current_key
from knnlm.v1 import datastore_pb2, lm_pb2
from knnlm.wire import protos
from knnlm.wire.jsonable import from_json, to_json

PROTOBUF = "protobuf"
KEEPALIVE_SECONDS = 60.0  # less than services keep idle connections, so that none is used that has just been closed

Reply = TypeVar("Reply")


class _Client:
    """A client of one service.

    base_url: http://host:port or https://. api_key: the key, or a function that gives it for each call (a SecretFile).
    timeout: seconds per call; the deadline of the request that is served holds too. encoding: "protobuf", or JSON with
    arrays as "base64" or "list". transport: an httpx.ASGITransport in tests. tls: for https; None: the certificates
    that the system trusts, and no certificate of the client.

    Every method raises the KnnlmError that the service raised, Unavailable when there is no service, DeadlineExceeded.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: ApiKey = None,
        timeout: float = 60.0,
        encoding: str = PROTOBUF,
        transport: httpx.AsyncBaseTransport | None = None,
        tls: Tls | None = None,
    ) -> None:
        self._base_url = base_url
        self._timeout = timeout
        self._api_key = api_key
        self._encoding = encoding
        self._http = httpx.AsyncClient(
            base_url=base_url,
            transport=transport,
            verify=True if tls is None else tls.ssl_context(),
            limits=httpx.Limits(keepalive_expiry=KEEPALIVE_SECONDS),
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def _message(self, path: str, message: Message, decode: Callable[[bytes], Reply]) -> Reply:
        """Send a protobuf message, read another."""
        response = await self._call("POST", path, message.SerializeToString(), "application/protobuf")
        try:
            return decode(response.content)
        except DecodeError as err:
            raise KnnlmError(f"{self._base_url}{path} answered something that is not the message") from err

    async def _json(self, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
        """The answer's JSON object; its fields are checked by those who read them."""
        return answered_json(await self._call(method, path, None if body is None else _encoded(body)))

    async def _call(
        self, method: str, path: str, content: bytes | None = None, content_type: str = "application/json"
    ) -> httpx.Response:
        limit = time_limit(self._timeout)
        headers = outgoing_headers(self._api_key, limit)
        if content is not None:
            headers["content-type"] = content_type
        try:
            response = await self._http.request(method, path, content=content, headers=headers, timeout=limit)
        except httpx.TransportError as err:
            raise transport_error(err, self._base_url, limit) from err
        if response.status_code >= 400:
            raise translated(response)
        return response


class HttpLanguageModel(_Client):
    """An lm service."""

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        if self._encoding == PROTOBUF:
            message = protos.forward_request_to_proto(request)
            answer = await self._message("/v1/forward", message, lm_pb2.ForwardResponse.FromString)
            return protos.from_proto(ForwardResult, answer)
        body = {**to_json(request, self._encoding), "encoding": self._encoding}
        return from_json(ForwardResult, await self._json("POST", "/v1/forward", body))

    async def get_model(self) -> ModelInfo:
        return from_json(ModelInfo, await self._json("GET", "/v1/model"))

    async def get_tokenizer(self) -> str:
        return (await self._call("GET", "/v1/tokenizer")).content.decode()

    async def get_chat_template(self) -> str | None:
        template = (await self._json("GET", "/v1/chat_template")).get("chat_template")
        return None if template is None else str(template)


class HttpDatastore(_Client):
    """A datastore service. `activate` and changing documents need an admin key."""

    async def search(self, request: SearchRequest) -> SearchResult:
        path = f"/v1/domains/{quoted(request.domain, 'domain')}/search"
        if self._encoding == PROTOBUF:
            message = protos.to_proto(request, datastore_pb2.SearchRequest)
            answer = await self._message(path, message, datastore_pb2.SearchResponse.FromString)
            return protos.from_proto(SearchResult, answer)
        return from_json(SearchResult, await self._json("POST", path, self._in_domain(request)))

    async def passages(self, request: PassagesRequest) -> Sequence[Passage]:
        path = f"/v1/domains/{quoted(request.domain, 'domain')}/passages"
        if self._encoding == PROTOBUF:
            message = protos.to_proto(request, datastore_pb2.GetPassagesRequest)
            answer = await self._message(path, message, datastore_pb2.GetPassagesResponse.FromString)
            return protos.from_proto(PassagesResult, answer).passages
        return from_json(PassagesResult, await self._json("POST", path, self._in_domain(request))).passages

    async def list_domains(self) -> Sequence[DomainInfo]:
        return [from_json(DomainInfo, given) for given in (await self._json("GET", "/v1/domains"))["domains"]]

    async def get_domain(self, domain: str, version: str | None = None) -> DomainInfo:
        query = "" if version is None else f"?version={quoted(version, 'version')}"
        return from_json(DomainInfo, await self._json("GET", f"/v1/domains/{quoted(domain, 'domain')}{query}"))

    async def activate(self, domain: str, version: str) -> DomainInfo:
        path = f"/v1/domains/{quoted(domain, 'domain')}:activate"
        return from_json(DomainInfo, await self._json("POST", path, {"version": version}))

    async def add_documents(self, domain: str, documents: Sequence[Document], *, replace: bool = False) -> DomainChange:
        path = f"/v1/domains/{quoted(domain, 'domain')}/documents"
        body = {"documents": [to_json(document) for document in documents], "replace": replace}
        return from_json(DomainChange, await self._json("POST", path, body))

    async def remove_documents(self, domain: str, ids: Sequence[str]) -> DomainChange:
        path = f"/v1/domains/{quoted(domain, 'domain')}/documents:remove"
        return from_json(DomainChange, await self._json("POST", path, {"ids": list(ids)}))

    def _in_domain(self, request: SearchRequest | PassagesRequest) -> dict[str, object]:
        """The body of a request to a domain, which is in the path."""
        body = {**to_json(request, self._encoding), "encoding": self._encoding}
        del body["domain"]
        return body


def quoted(name: str, param: str) -> str:
    """The name as a part of a URL. Raises InvalidRequest for one that is empty or not valid Unicode."""
    if not name:
        raise InvalidRequest(f"{param} must not be empty", param=param)
    try:
        return quote(name, safe="")
    except UnicodeEncodeError as err:
        raise protos.not_unicode(param, err) from err


def _encoded(body: Mapping[str, object]) -> bytes:
    try:
        return json.dumps(body, allow_nan=False).encode()
    except ValueError as err:
        raise InvalidRequest(f"a number in the request is not finite: {err}") from err


def outgoing_headers(api_key: ApiKey, limit: float) -> dict[str, str]:
    """What every call carries: its key, how many seconds it may take, and the id and trace of the request served.
    Raises InvalidRequest for a key that no header could carry."""
    headers = {**dict(outgoing_metadata()), "x-request-timeout": f"{limit:.6g}"}
    key = current_key(api_key)
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    request_id = outgoing_id()
    if request_id is not None:
        headers["x-request-id"] = request_id
    return headers


def answered_json(response: httpx.Response) -> dict[str, Any]:  # Any: JSON
    """The answer's JSON object. Raises KnnlmError when it is none."""
    try:
        answer = response.json()
    except ValueError as err:
        raise KnnlmError(f"{response.url} answered something that is not JSON") from err
    if not isinstance(answer, dict):
        raise KnnlmError(f"{response.url} answered {type(answer).__name__}, expected a JSON object")
    return answer


def transport_error(err: httpx.TransportError, where: str, limit: float) -> KnnlmError:
    """What a call that got no answer raises. where: the service. limit: seconds it was given."""
    if isinstance(err, httpx.TimeoutException):
        return DeadlineExceeded(f"{where} did not answer within {limit:.3g} s")
    return Unavailable(f"{where} does not answer: {err}")


def translated(response: httpx.Response) -> KnnlmError:
    """The error that a response of status 400 or more stands for."""
    try:
        error = response.json()["error"]
        code, message, param = error["code"], error["message"], error["param"]
    except (ValueError, KeyError, TypeError):  # not one of our services, a proxy before it perhaps
        unreachable = response.status_code in (502, 503, 504)
        text = f"{response.url} answered {response.status_code}"
        return Unavailable(text) if unreachable else KnnlmError(text)
    return rebuild(code, message, param=param, retry_after=response.headers.get("retry-after"))
