"""What a client was made with, and what one of its calls is made of, however often it is made."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import grpc

from knnlm.clients.observer import Observer
from knnlm.clients.replica import Metadata, Method
from knnlm.clients.secrets import ApiKey
from knnlm.clients.tls import Tls

__all__ = ["Options", "Request", "Service"]

Stub = TypeVar("Stub")
Message = TypeVar("Message")
Reply = TypeVar("Reply")


@dataclass(frozen=True)
class Service(Generic[Stub]):
    """name: in full, for messages. label: one word, for an observer. stub: made over a channel."""

    name: str
    label: str
    stub: Callable[[grpc.aio.Channel], Stub]


@dataclass(frozen=True)
class Options:
    """What a client was made with; see GrpcLanguageModel."""

    api_key: ApiKey = None
    timeout: float = 60.0
    tls: Tls | None = None
    wait: float = 1.0
    hedge: bool = True
    observer: Observer | None = None


@dataclass(slots=True)
class Request(Generic[Stub, Message, Reply]):
    """domain, version: what the replica must have. deadline: of time.monotonic."""

    method: Callable[[Stub], Method[Message, Reply]]
    message: Message
    metadata: Metadata
    deadline: float
    domain: str | None
    version: str | None
