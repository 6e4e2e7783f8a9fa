"""What a caller may choose about retrieval: records that check their values when they are made. Pure.

`SearchOptions` is how a datastore is searched, and the only place where a search option is written down: the schemas of
the services, the options of the commands, the conversions to protobuf and the key by which searches are batched are
made from its fields. An error names the field as it is called here; a caller that nests it in a request adds the path.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, TypeVar

from knnlm.errors import InvalidRequest
from knnlm.neighbors import MIN_TEMPERATURE

Record = TypeVar("Record")

DEFAULT_K = 1024  # as in Khandelwal et al. 2020 (arXiv 1911.00172), unless a domain's tuning says otherwise
MAX_EXCLUDED_DOCUMENTS = 1024  # ids in one request
MAX_STEPS_AHEAD = 16
MAX_ID_CHARACTERS = 4096  # characters of the id of a document
MAX_THETA = 1e100  # no product of keys in float32, times it, overflows float64


@dataclass(frozen=True)
class Option:
    """What is known about one search option beside its name and default.

    kind: int, float, bool or tuple (texts). minimum: the least value of a number. flag: its name on the command line.
    requires: what an index must have for the option to mean something; one that has it names the option in its
    `efforts`. public: whether callers of the aggregator may give it.
    """

    kind: type
    description: str
    minimum: int | None = None
    flag: str | None = None
    requires: str | None = None
    public: bool = True


def option(kind: type, description: str, default: Any = None, **more: Any) -> Any:  # Any: as dataclasses.field
    """A field of a record of options; `more` as in Option."""
    return field(default=default, metadata={"option": Option(kind, description, **more)})


def options_of(record: type) -> Mapping[str, Option]:
    """What is known about each option of a record, by name."""
    return {f.name: f.metadata["option"] for f in fields(record)}


def record_of(record: type[Record], values: Mapping[str, Any]) -> Record:  # Any: checked by a schema or message
    """The record with the options among `values`; lists become tuples, and what is None is not asked for."""
    given = {name: values[name] for name in options_of(record) if values.get(name) is not None}
    return record(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


@dataclass(frozen=True)
class SearchOptions:
    """How to search: k neighbors per query, found how, and which ones do not count. None: not asked for.

    rescore: every candidate by the squared L2 to the stored keys (True), or none (False); None: to the keys as the
    index's pre-transform reduces them, where it keeps those, else to the stored keys, and with some indexes only the
    nearest candidates (knnlm.index.requests.Candidates). overfetch: a factor on k; all of them are rescored.
    exclude_own_documents: with the request's exclude_entries, not that entry alone, but all of its document.

    Raises InvalidRequest, with the field as `param`, for a value that no search can have. Whether an index knows the
    option is said by the search.
    """

    k: int | None = option(int, "Neighbors of each query in each domain.", minimum=1)
    nprobe: int | None = option(int, "Lists to visit, for indexes that have lists (ivf).", minimum=1, requires="lists")
    ef_search: int | None = option(
        int, "Candidates that a graph search keeps, for indexes that are graphs (hnsw).", minimum=1, requires="graph"
    )
    overfetch: float | None = option(float, "Candidates per neighbor, all of them rescored.", minimum=1)
    rescore: bool | None = option(
        bool, "All by distances to the stored keys, or none; by default what suits the index."
    )
    exclude_own_documents: bool = option(
        bool, "With exclude_entries: not that entry alone, but all of its document.", False, public=False
    )
    exclude_documents: tuple[str, ...] = option(
        tuple,
        f"Ids of documents that hold no neighbors: at most {MAX_EXCLUDED_DOCUMENTS}, of {MAX_ID_CHARACTERS} "
        "characters each. Every domain must have every one of them.",
        (),
        flag="--exclude-document",
    )

    def __post_init__(self) -> None:
        for name, option in SEARCH_OPTIONS.items():
            value, least = getattr(self, name), option.minimum
            if value is not None and least is not None and not least <= value < math.inf:
                raise InvalidRequest(f"{name} must be >= {least}, got {value}", param=name)
        _check_excluded(self.exclude_documents)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:  # Any: see record_of
        return record_of(cls, values)

    def asked(self) -> dict[str, Any]:
        """Name and value of every option that is asked for."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def or_else(self, others: "SearchOptions") -> "SearchOptions":
        """These options, and what is not asked for here as in `others`."""
        return replace(others, **self.asked())


SEARCH_OPTIONS = options_of(SearchOptions)


@dataclass(frozen=True)
class ReuseOptions:
    """How what was found at one place of a text is used behind it. Raises InvalidRequest, naming the field."""

    tau: int | None = option(
        int,
        "Where at least this many of the last place's neighbors hold the token that came, those behind them are the "
        "candidates of the next place, and no index is searched. The answer differs: fewer searches, other neighbors.",
        minimum=1,
    )
    ahead: int = option(
        int,
        "Of a completion: steps that are begun, on drafted tokens, while the neighbors of earlier places are searched. "
        "The text stays the same.",
        0,
        minimum=0,
    )

    def __post_init__(self) -> None:
        if not 0 <= self.ahead <= MAX_STEPS_AHEAD:
            raise InvalidRequest(f"ahead must lie in [0, {MAX_STEPS_AHEAD}], got {self.ahead}", param="reuse.ahead")
        if self.tau is not None and self.tau < 1:
            raise InvalidRequest(f"tau must be >= 1, got {self.tau}", param="reuse.tau")
        if self.tau is not None and self.ahead:
            raise InvalidRequest("tau needs certain tokens, ahead drafts them: give one of the two", param="reuse")


@dataclass(frozen=True)
class DomainOptions:
    """One domain of a request. What is None is taken from the tuning that is stored with the domain.

    lmbda: in [0, 1], the weight of what is retrieved. temperature: > 0, divides squared distances.
    """

    domain: str
    version: str | None = None
    lmbda: float | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        _check_lambda(self.lmbda)
        if self.temperature is not None and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise InvalidRequest(
                f"temperature must be > 0, got {self.temperature}; the least is {MIN_TEMPERATURE:g}",
                param="temperature",
            )


@dataclass(frozen=True)
class KnnOptions:
    """From which domains to retrieve, how to search them and how to mix.

    combine: of several domains, "mixture" (each its own softmax and weight) or "union" (one softmax over the neighbors
    of all). rule: a name of knnlm.rules.RULES; None: the one that was tuned, or "fixed" where lambda is given.
    on_datastore_error: "fail", or "lm_only" to answer from the LM and say so. reuse: of what was found before.
    """

    domains: tuple[DomainOptions, ...]
    search: SearchOptions = field(default_factory=SearchOptions)
    combine: str = "mixture"
    rule: str | None = None
    on_datastore_error: str = "fail"
    reuse: ReuseOptions = field(default_factory=ReuseOptions)

    def __post_init__(self) -> None:
        names = [d.domain for d in self.domains]
        if not names or len(set(names)) != len(names):
            raise InvalidRequest(f"expected one or more distinct domains, got {names}", param="domains")
        if self.combine not in ("mixture", "union"):
            raise InvalidRequest(f"combine must be mixture or union, got {self.combine!r}", param="combine")
        if self.on_datastore_error not in ("fail", "lm_only"):
            raise InvalidRequest(
                f"on_datastore_error must be fail or lm_only, got {self.on_datastore_error!r}",
                param="on_datastore_error",
            )


@dataclass(frozen=True)
class MemoryOptions:
    """Which memory is mixed, and how. lmbda: None for the weight that was fitted when it was made.

    on_memory_error: "fail", or "lm_only" to answer from the LM and say so. Raises InvalidRequest, with the field as
    `param`, for a value that cannot be.
    """

    name: str | None = option(str, "The memory, a name that the service was started with.")
    lmbda: float | None = option(float, "Weight of the memory, 0 to 1; by default as fitted when it was made.")
    on_memory_error: str | None = option(
        str, "When the memory is down: fail with 503, or lm_only: answer from the LM and say so in `degraded`."
    )

    def __post_init__(self) -> None:
        if not self.name:
            raise InvalidRequest("memory needs a name", param="name")
        _check_lambda(self.lmbda)
        if self.on_memory_error not in (None, "fail", "lm_only"):
            raise InvalidRequest(
                f"on_memory_error must be fail or lm_only, got {self.on_memory_error!r}", param="on_memory_error"
            )


def _check_lambda(lmbda: float | None) -> None:
    if lmbda is not None and not 0 <= lmbda <= 1:
        raise InvalidRequest(f"lambda must lie in [0, 1], got {lmbda}", param="lambda")


@dataclass(frozen=True)
class CacheOptions:
    """How the text's own past is mixed. Raises InvalidRequest, naming the field, for values out of range."""

    lmbda: float | None = option(float, "Weight of the text's own past, in [0, 1]; by default as tuned.", minimum=0)
    theta: float | None = option(
        float, "Multiplies dot products of keys: how much alike places must be; by default as tuned.", minimum=0
    )
    size: int | None = option(int, "Earlier places that are looked at; by default as tuned.", minimum=1)
    max_size: int | None = option(int, "Of them at most, where size is as tuned.", minimum=1, public=False)

    def __post_init__(self) -> None:
        _check_lambda(self.lmbda)
        if self.theta is not None:
            check_theta(self.theta)
        if self.size is not None and self.size < 1:
            raise InvalidRequest(f"size must be >= 1, got {self.size}", param="size")


def check_theta(theta: float) -> None:
    """Raises InvalidRequest unless 0 <= theta <= MAX_THETA."""
    if not 0 <= theta <= MAX_THETA:
        raise InvalidRequest(f"theta must lie in [0, {MAX_THETA:g}], got {theta}", param="theta")


def _check_excluded(documents: Sequence[str]) -> None:
    param = "exclude_documents"
    if len(documents) > MAX_EXCLUDED_DOCUMENTS:
        raise InvalidRequest(
            f"{param} may name at most {MAX_EXCLUDED_DOCUMENTS} documents, got {len(documents)}", param=param
        )
    longest = max(map(len, documents), default=0)
    if longest > MAX_ID_CHARACTERS:
        raise InvalidRequest(
            f"{param} may name documents of at most {MAX_ID_CHARACTERS} characters, got one of {longest}",
            param=param,
        )
