"""What a failed call means: the error its caller gets, and whether another replica may do better."""

from collections.abc import Iterator
from enum import Enum

import grpc

from knnlm.errors import DeadlineExceeded, KnnlmError, Overloaded, TooLarge, Unavailable, UnknownDomain, UnknownVersion

CONNECTION_LOST = ("RST_STREAM", "Stream removed", "GOAWAY")  # gRPC's words for a connection that ended, not the call


class Kind(Enum):
    UNREACHABLE = "the replica does not answer, starts or drains: another one may answer, and this one later"
    ABSENT = "this replica does not have the domain or version: another one may"
    OVERLOADED = "its queue is full: another one's may not be"
    FINAL = "every replica would answer the same"


class Failed(Exception):
    """code: gRPC's status. heard: something arrived from the replica or its machine, so it is not silent."""

    def __init__(self, kind: Kind, error: KnnlmError, code: grpc.StatusCode, *, heard: bool = True) -> None:
        super().__init__(error.message)
        self.kind = kind
        self.error = error
        self.code = code
        self.heard = heard


def unreachable(message: str, *, heard: bool = False) -> Failed:
    return Failed(Kind.UNREACHABLE, Unavailable(message), grpc.StatusCode.UNAVAILABLE, heard=heard)


def deadline_exceeded(where: str) -> Failed:
    error = DeadlineExceeded(f"{where} did not answer in time")
    return Failed(Kind.FINAL, error, grpc.StatusCode.DEADLINE_EXCEEDED, heard=False)


def classify(err: grpc.aio.AioRpcError, where: str) -> Failed:
    """The failure that a status of gRPC stands for. where: service and replica, named in errors of gRPC's own."""
    metadata = {key: value for key, value in err.trailing_metadata() or () if isinstance(value, str)}
    details, code = err.details() or "", err.code()
    if "knnlm-error-code" in metadata:
        param, retry_after = metadata.get("knnlm-error-param"), metadata.get("retry-after")
        error = rebuild(metadata["knnlm-error-code"], details, param=param, retry_after=retry_after)
        return Failed(_kind(error), error, code)
    lost = any(sign in details for sign in CONNECTION_LOST)
    match code:  # gRPC itself failed, not the service
        case grpc.StatusCode.UNAVAILABLE:
            return Failed(Kind.UNREACHABLE, Unavailable(f"{where} does not answer: {details}"), code)
        case grpc.StatusCode.CANCELLED:  # by the server: one that stops drops the calls it has not begun
            return Failed(Kind.UNREACHABLE, Unavailable(f"{where} broke the call off: {details}"), code)
        case grpc.StatusCode.INTERNAL | grpc.StatusCode.UNKNOWN if lost:
            return Failed(Kind.UNREACHABLE, Unavailable(f"{where} broke the call off: {details}"), code)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return deadline_exceeded(where)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:  # a message over gRPC's size limit
            return Failed(Kind.FINAL, TooLarge(f"{where}: {details}"), code)
        case _:
            return Failed(Kind.FINAL, KnnlmError(f"{where}: {code.name} {details}"), code)


def rebuild(code: str, message: str, *, param: str | None = None, retry_after: str | None = None) -> KnnlmError:
    """The error of a service, by its stable code. A code that no class has, such as `internal`: a plain KnnlmError."""
    found = {cls.code: cls for cls in _subclasses(KnnlmError)}.get(code, KnnlmError)
    if found is Overloaded:
        return Overloaded(message, param=param, retry_after=_seconds(retry_after))
    return found(message, param=param)


def _kind(error: KnnlmError) -> Kind:
    if isinstance(error, UnknownDomain | UnknownVersion):
        return Kind.ABSENT
    if isinstance(error, Unavailable):  # with a param it is about one domain, which that replica cannot serve
        return Kind.UNREACHABLE if error.param is None else Kind.ABSENT
    return Kind.OVERLOADED if isinstance(error, Overloaded) else Kind.FINAL


def _subclasses(cls: type[KnnlmError]) -> Iterator[type[KnnlmError]]:
    for child in cls.__subclasses__():
        if child.__module__ == KnnlmError.__module__:
            yield child
            yield from _subclasses(child)


def _seconds(text: str | None) -> float:
    try:
        return float(text or "1")
    except ValueError:
        return 1.0
