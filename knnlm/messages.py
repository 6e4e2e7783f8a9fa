"""The nouns that cross borders: what a language model and a datastore are asked, and what they answer.

In process, over gRPC and over HTTP the same objects are meant; knnlm/wire turns them into bytes and back. Rows are
flat: the answers to several sequences or positions stand one below the other, in the order they were asked.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from knnlm.errors import InvalidRequest, Unavailable
from knnlm.neighbors import MISSING_DISTANCE, Neighbors
from knnlm.options import SearchOptions
from knnlm.tuning_records import Tuning

T = TypeVar("T")
# what a model's answers follow from, by the names of ModelInfo's fields
IDENTITY = ("weights_sha256", "tokenizer_sha256", "key_function", "config_sha256", "bos_token_id")
PASSAGE_TOKENS = 24  # tokens of text shown on each side of a passage unless asked otherwise


@dataclass(frozen=True)
class ForwardRequest:
    """Sequences to run through the model, and what is wanted at which positions.

    tokens: one (t_i,) int32 array per sequence, BOS included by the caller. positions: one ascending (p_i,) int32
    array per sequence; position j asks for the distribution of the token *after* tokens[:j + 1]. n = sum of p_i.
    full: log-probabilities of every token. targets: (n,) int32, log-probability of these tokens alone. top_n: the n
    likeliest tokens. keys: the context vectors. statistics: of each distribution, its entropy and its largest
    log-probability. candidates: one (c,) int32 array of tokens per position, n arrays, whose log-probabilities are
    wanted. temperatures: (n,) float32, finite and > 0, for the log power sums.

    cache: what is kept of earlier sequences may be used, and what is computed for these is kept: their next step will
    come. Answers are the same without it.
    """

    tokens: Sequence[npt.NDArray[np.int32]]
    positions: Sequence[npt.NDArray[np.int32]]
    full: bool = False
    targets: npt.NDArray[np.int32] | None = None
    top_n: int = 0
    keys: bool = False
    statistics: bool = False
    candidates: Sequence[npt.NDArray[np.int32]] | None = None
    temperatures: npt.NDArray[np.float32] | None = None
    cache: bool = False

    @property
    def wanted(self) -> tuple[bool | int, ...]:
        """What is asked of each position."""
        given = (values is not None for values in (self.targets, self.candidates, self.temperatures))
        return (self.full, self.top_n, self.keys, self.statistics, *given)

    @property
    def batch_key(self) -> tuple[bool | int, ...]:
        """Equal for requests that can be put together."""
        return (self.cache, *self.wanted)


@dataclass(frozen=True)
class LmStatistics:
    """What the LM says at n positions. entropy: (n,) nats. largest_log_prob: (n,), of the likeliest token. keys:
    (n, d), None where they were not asked for."""

    entropy: npt.NDArray[np.floating]
    largest_log_prob: npt.NDArray[np.floating]
    keys: npt.NDArray[np.floating] | None = None

    def at(self, rows: slice | npt.NDArray[Any]) -> "LmStatistics":  # Any: numbers of rows, or whether each counts
        """The statistics at some of the positions."""
        keys = None if self.keys is None else self.keys[rows]
        return LmStatistics(self.entropy[rows], self.largest_log_prob[rows], keys)


@dataclass(frozen=True)
class ForwardResult:
    """What was asked for, None elsewhere; n rows. All log-probabilities are natural logarithms, float32.

    log_probs: (n, V). target_log_probs: (n,). top_tokens: (n, m) int32, likeliest first; top_log_probs: (n, m).
    keys: (n, d) float32, or float16 when the model's dtype is a half. entropy: (n,) nats. largest_log_prob: (n,), of
    the likeliest token. candidate_log_probs: of all candidates, position after position. log_power_sums: (n,), the
    logarithm of the sum over all tokens of p ** (1 / temperature), by which tempered probabilities are divided.
    fingerprint: of the model that answered, as in ModelInfo. timings: seconds per stage.
    """

    log_probs: npt.NDArray[np.float32] | None = None
    target_log_probs: npt.NDArray[np.float32] | None = None
    top_tokens: npt.NDArray[np.int32] | None = None
    top_log_probs: npt.NDArray[np.float32] | None = None
    keys: npt.NDArray[np.floating] | None = None
    entropy: npt.NDArray[np.float32] | None = None
    largest_log_prob: npt.NDArray[np.float32] | None = None
    candidate_log_probs: npt.NDArray[np.float32] | None = None
    log_power_sums: npt.NDArray[np.float32] | None = None
    fingerprint: str = ""
    timings: Mapping[str, float] = field(default_factory=dict)

    @property
    def statistics(self) -> LmStatistics | None:
        """The statistics of each distribution; None when they were not asked for."""
        if self.entropy is None or self.largest_log_prob is None:
            return None
        return LmStatistics(self.entropy, self.largest_log_prob, self.keys)


def required(value: T | None) -> T:
    """A field that the request asked for. Raises Unavailable for a service that left it out: it broke the protocol."""
    if value is None:
        raise Unavailable("the language model service did not answer what it was asked for")
    return value


@dataclass(frozen=True)
class TrainedMemory:
    """What a memory was trained on: a version of a domain, and the checksum of what it held. entries: of that version.
    beta: weight of p_kNN in what it learnt. lmbda: its weight beside the LM that was best on held-out documents."""

    domain: str
    version: str
    content: str
    entries: int
    beta: float
    lmbda: float


@dataclass(frozen=True)
class ModelInfo:
    """A loaded model, as its users and the manifests of datastores know it.

    config_sha256: of the part of the model's configuration that its answers depend on (knnlm.lm.loading.config_sha256).
    vocab_size: the width of the logits. context_length: tokens of the longest sequence. bos_token_id: put before every
    document once; None when the tokenizer has none. memory: of a Memory Decoder that was trained here.
    """

    model_id: str
    architecture: str
    weights_sha256: str
    tokenizer_sha256: str
    config_sha256: str
    vocab_size: int
    context_length: int
    key_function: str
    key_dim: int
    dtype: str
    device: str
    bos_token_id: int | None
    eos_token_id: int | None
    memory: TrainedMemory | None = None

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that differ when answers could: other weights, configuration, tokenizer, BOS token or
        key function."""
        return hashlib.sha256(" ".join(str(getattr(self, name)) for name in IDENTITY).encode()).hexdigest()[:16]


def differs(made_by: Mapping[str, object], model: ModelInfo) -> str | None:
    """The first field in which what made a datastore's keys is not this model; None when the model can use them.

    made_by: fields of ModelInfo as they were recorded. Where it has no config_sha256, its bos_token_id says nothing.
    """
    unrecorded = ("config_sha256", "bos_token_id") if made_by["config_sha256"] is None else ()
    looked_at = [n for n in (*IDENTITY, "key_dim", "vocab_size") if n in made_by and n not in unrecorded]
    return next((name for name in looked_at if made_by[name] != getattr(model, name)), None)


@dataclass(frozen=True)
class SearchRequest:
    """The neighbors of each query in one domain.

    queries: (n, d) float32 or float16, finite. options: how to search, with a k. version: answer from this version or
    not at all; None = the current one. ids: also return entry numbers. passages: of this many nearest neighbors per
    query also return the text around them, `passage_tokens` on each side. exclude_entries: (n,) int64, for each query
    an entry that does not count, for text that is in the datastore itself; -1 = none. follow: (n, c) int64, for each
    query distinct entries; only those that come next in their documents are looked at, by distances to stored keys, and
    no index is searched; -1 = none.
    """

    domain: str
    queries: npt.NDArray[np.floating]
    options: SearchOptions
    version: str | None = None
    ids: bool = False
    passages: int = 0
    passage_tokens: int = PASSAGE_TOKENS
    exclude_entries: npt.NDArray[np.int64] | None = None
    follow: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.options.k is None:
            raise InvalidRequest("k is required", param="k")

    @property
    def k(self) -> int:
        return self.options.k or 0

    def rows(self, start: int, end: int) -> "SearchRequest":
        """The same of some of the queries. What is left over of the arrays stays with the last: it is refused."""
        last = None if end >= len(self.queries) else end
        exclude = None if self.exclude_entries is None else self.exclude_entries[start:last]
        follow = None if self.follow is None else self.follow[start:last]
        return replace(self, queries=self.queries[start:end], exclude_entries=exclude, follow=follow)

    @property
    def batch_key(self) -> tuple[object, ...]:
        """Equal for requests that one search can answer: everything but the rows, and what a row must look like."""
        rows = ("queries", "exclude_entries", "follow")
        same = (getattr(self, f.name) for f in fields(self) if f.name not in rows)
        followed = None if self.follow is None else self.follow.shape[1:]
        excluded = self.exclude_entries is not None  # such a search rescores all candidates
        return (*same, self.queries.shape[1:], self.queries.dtype, excluded, followed)


@dataclass(frozen=True)
class Passage:
    """Where an entry came from. before: the tokens that end its context; after: its value and what followed."""

    document: str
    entry: int
    position: int  # where the value stands, in tokens from the document's beginning
    before: npt.NDArray[np.int32]
    after: npt.NDArray[np.int32]


@dataclass(frozen=True)
class SearchResult:
    """neighbors: (n, k'), k' = min(k, entries). passages: one list per query, nearest first; empty when not asked."""

    domain: str
    version: str
    neighbors: Neighbors
    passages: Sequence[Sequence[Passage]] = ()
    timings: Mapping[str, float] = field(default_factory=dict)

    def rows(self, start: int, end: int) -> "SearchResult":
        """What was found for some of the queries."""
        found = self.neighbors
        ids = None if found.ids is None else found.ids[start:end]
        neighbors = Neighbors(found.distances[start:end], found.values[start:end], ids)
        return replace(self, neighbors=neighbors, passages=self.passages[start:end])

    def among(self, rows: npt.NDArray[np.bool_]) -> "SearchResult":
        """The answer about queries of which only those at `rows`, (n,), were searched: the others found nothing."""
        found, shape = self.neighbors, (len(rows), self.neighbors.values.shape[1])
        distances, values = np.full(shape, MISSING_DISTANCE, np.float32), np.full(shape, -1, np.int32)
        distances[rows], values[rows] = found.distances, found.values
        ids = None
        if found.ids is not None:
            ids = np.full(shape, -1, np.int64)
            ids[rows] = found.ids
        searched = iter(self.passages)
        passages = [next(searched) if row else () for row in rows] if self.passages else ()
        return replace(self, neighbors=Neighbors(distances, values, ids), passages=passages)


@dataclass(frozen=True)
class PassagesRequest:
    """The text around entries that a search has found. entries: (m,) int64, each in [0, entries of the version).
    passage_tokens: on each side of them."""

    domain: str
    version: str
    entries: npt.NDArray[np.int64]
    passage_tokens: int = PASSAGE_TOKENS

    @property
    def batch_key(self) -> tuple[object, ...]:
        """Equal for requests that one lookup can answer: everything but the entries, and what they must look like."""
        return (self.domain, self.version, self.passage_tokens, self.entries.shape[1:], self.entries.dtype)


@dataclass(frozen=True)
class PassagesResult:
    """passages: one per entry, in the order of the request."""

    domain: str
    version: str
    passages: Sequence[Passage]
    timings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """Where a loaded version lies. index, keys: "resident" (held by the process), "mapped" (files, which the system
    may drop and read again) or, of an index alone, "device" (in the memory of a GPU) or "none" (it has no part of its
    own). keys: those that rescoring reads, the stored ones or an index's reduced ones. Bytes: of that part, once all
    is used.
    """

    index: str
    index_bytes: int
    keys: str
    keys_bytes: int


@dataclass(frozen=True)
class DomainInfo:
    """A domain as a datastore service serves it. `versions`: all on disk, oldest first. index: the one that answers;
    indexes: all that the version has.

    state: "ready", "loading v2", or "stale: REASON" when the version that is current on disk cannot be loaded.
    context_length, min_context: the windows its keys were made with, in tokens; None from a service that does not say.
    config_sha256, bos_token_id, model_dtype: of the model that made the keys, as in ModelInfo. config_sha256 and
    model_dtype are None where they were not recorded; bos_token_id then says nothing. window_bos: how windows after a
    document's first begin, "document" or "window" (datastore.manifest.WindowsRecord.bos).
    """

    domain: str
    version: str
    versions: Sequence[str]
    state: str
    entries: int
    documents: int
    key_dim: int
    key_dtype: str
    key_function: str
    index: str
    model_id: str
    weights_sha256: str
    tokenizer_sha256: str
    tuning: Tuning | None
    indexes: Sequence[str] = ()
    memory: Memory | None = None
    context_length: int | None = None
    min_context: int | None = None
    config_sha256: str | None = None
    model_dtype: str | None = None
    bos_token_id: int | None = None
    window_bos: str | None = None

    @property
    def window_bos_token_id(self) -> int | None:
        """The token that windows after a document's first begin with, None where they begin with the document's own."""
        return self.bos_token_id if self.window_bos == "window" else None


@dataclass(frozen=True)
class Document:
    """One text with the name it is known by. `id` need not be unique; `text` is never empty."""

    id: str
    text: str


@dataclass(frozen=True)
class DomainChange:
    """What adding or removing documents made of a domain: a version of its own. parent: the one that answered before.
    advice: a sentence, when compacting is worth while."""

    domain: str
    version: str
    parent: str
    added_documents: int = 0
    added_entries: int = 0
    removed_documents: int = 0
    removed_entries: int = 0
    advice: str | None = None
