"""Where the components of a mixture come from besides the LM: the contract of a source, and the table of all kinds.

A kind is one file and one row of SOURCES. It has a record of options, which requests give under the row's name, and
resolves them into sources once per plan, before any work is done.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, TypeVar, cast

from knnlm.errors import InvalidRequest
from knnlm.evidence import Evidence, Step
from knnlm.messages import DatastoreClient, DomainInfo, ModelInfo
from knnlm.rules import Weighing

__all__ = ["SOURCES", "Resolved", "Services", "Source", "SourceKind", "computed", "source_kind",
           "together"]  # fmt: skip

T = TypeVar("T")
INLINE_NUMBERS = 1 << 15  # some tens of nanoseconds each: the event loop does not notice

SOURCES: dict[str, str] = {"knn": "knnlm.domains:KNN"}  # a kind's name in requests, and where it is


class Source(Protocol):
    """One component of a mixture, resolved for one plan: what it answers does not change while the plan is used.

    name: unique in a plan; shown. kind: its row in the table of sources. weighing: what it weighs. needs_keys: whether
    it looks at context vectors. in_order: whether the stretches of one text must come one after another. optional:
    whether the LM alone may answer when what is behind it cannot.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def weighing(self) -> Weighing: ...
    @property
    def needs_keys(self) -> bool: ...
    @property
    def in_order(self) -> bool: ...
    @property
    def optional(self) -> bool: ...

    async def evidence(self, step: Step) -> Evidence:
        """What the source says of the predictions of a step. Blocking work runs on a thread.

        Raises Unavailable or DeadlineExceeded when what is behind it cannot answer, UnknownVersion when what the plan
        pinned was let go, and InvalidRequest for what was asked wrongly.
        """
        ...


async def computed(numbers: int, program: Callable[..., T], *given: Any) -> T:  # Any: what the program takes
    """program(*given), which works on `numbers` numbers: on a thread, unless that would take longer than the work."""
    return await asyncio.to_thread(program, *given) if numbers > INLINE_NUMBERS else program(*given)


async def together(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:  # Any: what a loop sends and is yielded
    """The results of all calls, made at the same time; one alone without a task of its own. Raises what one raises."""
    return [await calls[0]] if len(calls) == 1 else await asyncio.gather(*calls)


@dataclass(frozen=True)
class Services:
    """What sources may be made of. info: the language model, whose keys and vocabulary they must fit."""

    info: ModelInfo
    datastore: DatastoreClient


@dataclass(frozen=True)
class Resolved:
    """The sources that options of one kind became. domains: what answers say of those that are domains, and how they
    were made; pinned: whether the caller chose every version, so that none can have been switched under the call."""

    sources: Sequence[Source]
    domains: Sequence[Any] = ()  # Any: knnlm.domains.UsedDomain, which is above
    infos: Sequence[DomainInfo] = ()
    pinned: bool = True


class SourceKind(Protocol):
    """One row of the table. options: the record of what a request may say; its fields have knnlm.options.Option."""

    @property
    def options(self) -> type: ...

    def optional(self, options: Any) -> bool:  # Any: of the type `options`, here and below
        """Whether the LM alone may answer when what is behind the source cannot."""
        ...

    async def resolve(self, options: Any, services: Services) -> Resolved:
        """Everything that can be refused is refused here. Raises InvalidRequest, UnknownDomain, UnknownVersion,
        DatastoreMismatch, and Unavailable or DeadlineExceeded when what is behind cannot be asked."""
        ...


def source_kind(name: str) -> SourceKind:
    """The kind in the row of that name. Raises InvalidRequest, naming the known ones."""
    if name not in SOURCES:
        raise InvalidRequest(f"unknown source {name!r}; known: {', '.join(SOURCES)}", param=name)
    module, _, attribute = SOURCES[name].partition(":")
    return cast(SourceKind, getattr(import_module(module), attribute))
