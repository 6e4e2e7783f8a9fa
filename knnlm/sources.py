"""Where the components of a mixture come from besides the LM: the contract of a source, the plan that one call is made
with, and the table of all kinds of sources.

A kind is one file and one row of SOURCES. It has a record of options, which requests give under the row's name, and
resolves them into sources once per plan, before any work is done.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from knnlm.attribution import Carrier
from knnlm.errors import InvalidRequest
from knnlm.evidence import Evidence, Step
from knnlm.messages import DomainInfo, ModelInfo, SearchResult
from knnlm.options import DEFAULT_K, SearchOptions
from knnlm.protocols import DatastoreClient
from knnlm.rules import Weighing

T = TypeVar("T")
Timings = dict[str, float]  # seconds per stage
INLINE_NUMBERS = 1 << 15  # some tens of nanoseconds each: the event loop does not notice

SOURCES: dict[str, str] = {
    "knn": "knnlm.domains:KNN",
    "cache": "knnlm.cache_source:CACHE",
    "memory": "knnlm.memories:MEMORY",
}  # a kind's name in requests, and where it is


class Source(Protocol):
    """One component of a mixture, resolved for one plan: what it answers does not change while the plan is used.

    name: unique in a plan; shown. kind: its row in the table of sources. weighing: what it weighs. needs_keys: whether
    it looks at context vectors. in_order: whether the stretches of one text must come one after another. whole: whether
    it gives every token a probability. optional: whether the LM alone may answer when what is behind it cannot.
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
    def whole(self) -> bool: ...
    @property
    def optional(self) -> bool: ...

    async def evidence(self, step: Step) -> Evidence:
        """What the source says of the predictions of a step. Blocking work runs on a thread.

        Raises Unavailable or DeadlineExceeded when what is behind it cannot answer, UnknownVersion when what the plan
        pinned was let go, and InvalidRequest for what was asked wrongly.
        """
        ...


@runtime_checkable
class Remembering(Protocol):
    """A source that looks at the keys of earlier places of the same text. name: as in Source, under which it keeps them
    in the state of a text. earlier: places before a text's first prediction whose keys it wants, at most."""

    @property
    def name(self) -> str: ...
    @property
    def earlier(self) -> int: ...


@runtime_checkable
class Carrying(Protocol):
    """A source that has entries. optional: as in Source."""

    @property
    def optional(self) -> bool: ...

    async def carried(
        self, found: Sequence[SearchResult], targets: npt.NDArray[np.integer], count: int, passage_tokens: int
    ) -> Sequence[Sequence[Carrier]]:
        """At most `count` of the entries that gave each target (n,) most, with `passage_tokens` tokens of text on
        each side. found: the searches of this source's evidence of n predictions, with ids. Raises as
        Source.evidence."""
        ...


async def computed(numbers: int, program: Callable[..., T], *given: Any) -> T:  # Any: what the program takes
    """program(*given), which works on `numbers` numbers: on a thread, unless that would take longer than the work."""
    return await asyncio.to_thread(program, *given) if numbers > INLINE_NUMBERS else program(*given)


async def together(calls: Sequence[Awaitable[T]]) -> list[T]:
    """The results of all calls, made at the same time; one alone without a task of its own. Raises what one raises."""
    return [await calls[0]] if len(calls) == 1 else await asyncio.gather(*calls)


async def timed(call: Awaitable[T], stage: str, timings: Timings) -> T:
    """Await, and add the seconds it took to timings[stage]."""
    begin = time.perf_counter()
    try:
        return await call
    finally:
        timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - begin


@dataclass(frozen=True)
class Services:
    """What sources may be made of. info: the language model, whose keys and vocabulary they must fit. asked: the kinds
    of sources in this call. infos, used: the domains that were resolved before. memories: by the names that requests
    give them, each a LanguageModelClient or knnlm.memories.KeyMemory."""

    info: ModelInfo
    datastore: DatastoreClient
    asked: frozenset[str] = frozenset()
    infos: tuple[DomainInfo, ...] = ()
    used: tuple["UsedDomain", ...] = ()
    memories: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class UsedDomain:
    """What a domain is asked with in the end, and the version that answers."""

    domain: str
    version: str
    temperature: float
    search: SearchOptions
    weighing: Weighing

    @property
    def k(self) -> int:
        return self.search.k or DEFAULT_K

    @property
    def rule(self) -> str:
        return self.weighing.rule

    @property
    def lmbda(self) -> float | None:
        """The weight of retrieval where the rule has one for all predictions."""
        value = self.weighing.parameters.get("lambda")
        return value if isinstance(value, int | float) else None

    def as_json(self) -> dict[str, object]:
        """What answers say of it."""
        shown = {n: getattr(self, n) for n in ("domain", "version", "temperature", "k", "rule")}
        return {**shown, "lambda": self.lmbda}


@dataclass(frozen=True)
class UsedMemory:
    """A memory and its weight. model_id, fingerprint: of the model that answers, as in ModelInfo; None for one that was
    not asked, because its weight is 0."""

    name: str
    lmbda: float
    model_id: str | None = None
    fingerprint: str | None = None

    def as_json(self) -> dict[str, object]:
        """What answers say of it."""
        return {"name": self.name, "lambda": self.lmbda, "model_id": self.model_id, "fingerprint": self.fingerprint}


@dataclass(frozen=True)
class Plan:
    """What one call or one completion is made with: resolved, pinned, checked and possibly degraded, once.

    sources: what is mixed with the LM, in the order of the answer. domains: those among them, as answers show them.
    infos: how each of these was made. pinned: whether the caller chose every version, so that none can have been
    switched under the call. degraded: why the LM alone answers, None when it is as asked. memories: those among the
    sources, and those of weight 0, as answers show them. context_length: tokens that every source takes; None for any.
    ahead: steps of a completion that may be begun before it is certain which token they follow (knnlm/ahead.py).
    """

    sources: tuple[Source, ...] = ()
    domains: tuple[UsedDomain, ...] = ()
    infos: tuple[DomainInfo, ...] = ()
    pinned: bool = True
    degraded: str | None = None
    memories: tuple[UsedMemory, ...] = ()
    context_length: int | None = None
    ahead: int = 0

    @property
    def whole(self) -> bool:
        return any(source.whole for source in self.sources)

    @property
    def needs_keys(self) -> bool:
        return any(source.needs_keys for source in self.sources)

    @property
    def statistics(self) -> bool:
        return any(source.weighing.statistics for source in self.sources)

    @property
    def in_order(self) -> bool:
        return any(source.in_order for source in self.sources)

    def earlier(self, state: Mapping[str, Any]) -> int:  # Any: as in knnlm.evidence.Stretch
        """Places before the first prediction of a text whose keys are wanted, when this is its state."""
        wanted = [s.earlier for s in self.sources if isinstance(s, Remembering) and s.name not in state]
        return max(wanted, default=0)

    @property
    def optional(self) -> bool:
        """Whether the LM alone may answer when a source cannot."""
        return all(source.optional for source in self.sources)

    def __add__(self, other: "Plan") -> "Plan":
        """The sources of both, of which neither is degraded."""
        return Plan(
            self.sources + other.sources,
            self.domains + other.domains,
            self.infos + other.infos,
            self.pinned and other.pinned,
            memories=self.memories + other.memories,
            ahead=max(self.ahead, other.ahead),
            context_length=min((n for n in (self.context_length, other.context_length) if n is not None), default=None),
        )


class SourceKind(Protocol):
    """One row of the table. options: the record of what a request may say; its fields have knnlm.options.Option."""

    @property
    def options(self) -> type: ...

    def optional(self, options: Any) -> bool:  # Any: of the type `options`, here and below
        """Whether the LM alone may answer when what is behind the source cannot."""
        ...

    async def resolve(self, options: Any, services: Services) -> Plan:
        """The plan with these sources alone. Everything that can be refused is refused here. Raises InvalidRequest,
        UnknownDomain, UnknownVersion, DatastoreMismatch, and Unavailable or DeadlineExceeded when what is behind
        cannot be asked."""
        ...


def source_kind(name: str) -> SourceKind:
    """The kind in the row of that name. Raises InvalidRequest, naming the known ones."""
    if name not in SOURCES:
        raise InvalidRequest(f"unknown source {name!r}; known: {', '.join(SOURCES)}", param=name)
    module, _, attribute = SOURCES[name].partition(":")
    return cast(SourceKind, getattr(import_module(module), attribute))
