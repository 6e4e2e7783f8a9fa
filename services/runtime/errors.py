"""What every error becomes on the wire: the one table from codes to HTTP statuses and gRPC codes.

Services raise knnlm.errors; nothing else in services/ knows a status.
"""

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from knnlm.errors import InvalidRequest, KnnlmError, Overloaded, Unavailable

MAX_SHOWN_CHARACTERS = 80  # in a message, of a bad value


@dataclass(frozen=True)
class Row:
    """type: the word that clients of OpenAI-like servers look at."""

    status: int
    grpc: grpc.StatusCode
    type: str


_INVALID, _MISSING, _STATE, _SERVER = "invalid_request_error", "not_found_error", "conflict_error", "server_error"

TABLE: Mapping[str, Row] = {
    "error": Row(500, grpc.StatusCode.INTERNAL, _SERVER),
    "internal": Row(500, grpc.StatusCode.INTERNAL, _SERVER),
    "invalid_request": Row(400, grpc.StatusCode.INVALID_ARGUMENT, _INVALID),
    "method_not_allowed": Row(405, grpc.StatusCode.UNIMPLEMENTED, _INVALID),
    "too_large": Row(413, grpc.StatusCode.INVALID_ARGUMENT, _INVALID),
    "not_found": Row(404, grpc.StatusCode.NOT_FOUND, _MISSING),
    "unknown_domain": Row(404, grpc.StatusCode.NOT_FOUND, _MISSING),
    "unknown_version": Row(404, grpc.StatusCode.NOT_FOUND, _MISSING),
    "unknown_model": Row(404, grpc.StatusCode.NOT_FOUND, _MISSING),
    "conflict": Row(409, grpc.StatusCode.FAILED_PRECONDITION, _STATE),
    "datastore_error": Row(409, grpc.StatusCode.FAILED_PRECONDITION, _STATE),
    "datastore_corrupt": Row(409, grpc.StatusCode.FAILED_PRECONDITION, _STATE),
    "datastore_mismatch": Row(409, grpc.StatusCode.FAILED_PRECONDITION, _STATE),
    "datastore_incomplete": Row(409, grpc.StatusCode.FAILED_PRECONDITION, _STATE),
    "insufficient_memory": Row(507, grpc.StatusCode.FAILED_PRECONDITION, _SERVER),
    "unauthenticated": Row(401, grpc.StatusCode.UNAUTHENTICATED, "authentication_error"),
    "permission_denied": Row(403, grpc.StatusCode.PERMISSION_DENIED, "permission_error"),
    "overloaded": Row(429, grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limit_error"),
    "unavailable": Row(503, grpc.StatusCode.UNAVAILABLE, "unavailable_error"),
    "deadline_exceeded": Row(504, grpc.StatusCode.DEADLINE_EXCEEDED, "timeout_error"),
    "model_error": Row(500, grpc.StatusCode.INTERNAL, _SERVER),
    "unknown_architecture": Row(500, grpc.StatusCode.INTERNAL, _SERVER),
}


class Internal(KnnlmError):
    """Something that nobody foresaw. What it was is in the log, beside the request id, and not in the answer."""

    code = "internal"


class MethodNotAllowed(KnnlmError):
    code = "method_not_allowed"


def row(err: KnnlmError) -> Row:
    return TABLE[err.code]


def body(err: KnnlmError) -> dict[str, dict[str, str | None]]:
    """The JSON of every HTTP error."""
    param = None if err.param is None else _printable(err.param)
    return {"error": {"message": _printable(err.message), "type": row(err).type, "param": param, "code": err.code}}


def headers(err: KnnlmError) -> dict[str, str]:
    """Retry-After where trying again makes sense; x-should-retry: false where clients would and it does not."""
    seconds = _retry_after(err)
    if seconds is not None:
        return {"retry-after": f"{max(1, math.ceil(seconds))}"}
    if row(err).type == _STATE:
        return {"x-should-retry": "false"}
    if row(err).status == 401:
        return {"www-authenticate": "Bearer"}
    return {}


def metadata(err: KnnlmError) -> tuple[tuple[str, str], ...]:
    """Trailing metadata of every gRPC error: clients rebuild the error from it."""
    pairs = [("knnlm-error-code", err.code)]
    if err.param is not None and err.param.isascii() and err.param.isprintable():
        pairs.append(("knnlm-error-param", err.param))
    seconds = _retry_after(err)
    if seconds is not None:
        pairs.append(("retry-after", f"{seconds:g}"))
    return tuple(pairs)


def from_validation(problem: Mapping[str, Any], body: object = None) -> InvalidRequest:
    """One of pydantic's problems (its values are of any type) as an error. body: what it is about, where it is JSON:
    the field is named as it stands there."""
    if problem["type"] == "json_invalid":
        reason = problem.get("ctx", {}).get("error", problem["msg"])
        return InvalidRequest(f"the body is not JSON: {reason} at character {problem['loc'][-1]}")
    path = _path(problem["loc"][1:], body)
    param = ".".join(path) or str(problem["loc"][0])
    words = {"missing": f"{param} is required", "extra_forbidden": f"{param} is not a known field"}
    given = _SHORTENED.repr(problem.get("input"))
    shown = given if len(given) <= MAX_SHOWN_CHARACTERS else given[:MAX_SHOWN_CHARACTERS] + "…"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return InvalidRequest(words.get(problem["type"], f"{param}: {message}, got {shown}"), param=param)


def _path(parts: Sequence[str | int], body: object) -> list[str]:
    """The parts that lead through the body, and the last: pydantic puts names of its own between, of alternatives."""
    path = []
    for number, part in enumerate(parts):
        inside = (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int))
        missing = isinstance(body, dict) and number == len(parts) - 1
        if inside or missing or body is None:
            path.append(str(part))
        if inside:
            body = body[part]  # type: ignore[index]  # just checked
    return path


_SHORTENED = reprlib.Repr()  # writes only the beginning of a long list, and as much of a long text as is shown
_SHORTENED.maxlevel, _SHORTENED.maxlist, _SHORTENED.maxstring = 2, MAX_SHOWN_CHARACTERS // 2, 4 * MAX_SHOWN_CHARACTERS


def _printable(text: str) -> str:
    """The text as it can be sent. Half of a surrogate pair, in the name of an unknown field perhaps, has no bytes in
    UTF-8: an escape. Of an integer of thousands of digits, which JSON takes, the beginning."""
    return _LONG_NUMBER.sub(r"\1…", text).encode(errors="backslashreplace").decode()


_LONG_NUMBER = re.compile(r"(\d{20})\d{20,}")


def _retry_after(err: KnnlmError) -> float | None:
    if isinstance(err, Overloaded):
        return err.retry_after
    return 1.0 if isinstance(err, Unavailable) else None
