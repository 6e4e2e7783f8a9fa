"""What a failed gRPC call means: the error a caller gets, and whether another replica may do better."""

from enum import Enum

import grpc

from knnlm.clients.errors import rebuild
from knnlm.errors import DeadlineExceeded, KnnlmError, Overloaded, TooLarge, Unavailable, UnknownDomain, UnknownVersion

__all__ = ["Failed", "Kind", "away", "over", "understood"]

BROKEN_OFF = ("RST_STREAM", "Stream removed", "GOAWAY")  # how gRPC says that the connection went, not the service


class Kind(Enum):
    AWAY = "nobody answers there, or it is starting or draining: another replica may, and this one later"
    ABSENT = "this replica does not have the domain or version: another one may"
    OVERLOADED = "its queue is full: another one's may not be"
    FINAL = "every replica would say the same"


class Failed(Exception):
    """code: of gRPC. heard: the replica itself said something, or its machine did: it is not silent."""

    def __init__(self, kind: Kind, error: KnnlmError, code: grpc.StatusCode, *, heard: bool = True) -> None:
        super().__init__(error.message)
        self.kind = kind
        self.error = error
        self.code = code
        self.heard = heard


def away(message: str) -> Failed:
    """Nobody answered, and nothing was heard either."""
    return Failed(Kind.AWAY, Unavailable(message), grpc.StatusCode.UNAVAILABLE, heard=False)


def over(where: str) -> Failed:
    """The time of the call is over."""
    error = DeadlineExceeded(f"{where} did not answer in time")
    return Failed(Kind.FINAL, error, grpc.StatusCode.DEADLINE_EXCEEDED, heard=False)


def understood(err: grpc.aio.AioRpcError, where: str) -> Failed:
    """where: which service and replica, for the message of an error that is gRPC's own."""
    given = {key: value for key, value in err.trailing_metadata() or () if isinstance(value, str)}
    details = err.details() or ""
    code = err.code()
    if "knnlm-error-code" in given:
        error = rebuild(
            given["knnlm-error-code"],
            details,
            param=given.get("knnlm-error-param"),
            retry_after=given.get("retry-after"),
        )
        return Failed(_kind(error), error, code)
    match code:  # gRPC itself failed, not the service
        case grpc.StatusCode.UNAVAILABLE:
            return Failed(Kind.AWAY, Unavailable(f"{where} does not answer: {details}"), code)
        case grpc.StatusCode.CANCELLED:  # by its end: a server that stops gives up what it had not yet begun
            return Failed(Kind.AWAY, Unavailable(f"{where} broke the call off: {details}"), code)
        case grpc.StatusCode.INTERNAL | grpc.StatusCode.UNKNOWN if any(sign in details for sign in BROKEN_OFF):
            return Failed(Kind.AWAY, Unavailable(f"{where} broke the call off: {details}"), code)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return over(where)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:  # what it says about messages over a size limit
            return Failed(Kind.FINAL, TooLarge(f"{where}: {details}"), code)
        case _:
            return Failed(Kind.FINAL, KnnlmError(f"{where}: {code.name} {details}"), code)


def _kind(error: KnnlmError) -> Kind:
    if isinstance(error, UnknownDomain | UnknownVersion):
        return Kind.ABSENT
    if isinstance(error, Unavailable):  # with a param it is about one domain, which is broken there
        return Kind.AWAY if error.param is None else Kind.ABSENT
    return Kind.OVERLOADED if isinstance(error, Overloaded) else Kind.FINAL
