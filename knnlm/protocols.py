"""Who is asked with the messages of messages.py: a language model, one opened domain, and the two services.

Library and services are written over these Protocols; objects in this process, gRPC and HTTP keep them.
"""

from collections.abc import Sequence
from typing import Protocol

from knnlm.messages import (
    Document,
    DomainChange,
    DomainInfo,
    ForwardRequest,
    ForwardResult,
    Memory,
    ModelInfo,
    Passage,
    PassagesRequest,
    SearchRequest,
    SearchResult,
)
from knnlm.tokenizer import Tokenizer


class LanguageModel(Protocol):
    """A language model that blocks while it works, as knnlm.lm.model.LanguageModel."""

    @property
    def info(self) -> ModelInfo: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    def forward(self, request: ForwardRequest) -> ForwardResult:
        """Called by one thread at a time. Raises InvalidRequest, naming the field, for what the model cannot take;
        ModelError when it fails; where it is remote what LanguageModelClient raises as well."""
        ...


class Searching(Protocol):
    """One opened version of one domain, as knnlm.index.searcher.Searcher. held_bytes: in this process's own memory."""

    @property
    def memory(self) -> Memory: ...
    @property
    def held_bytes(self) -> int: ...
    def search(self, request: SearchRequest) -> SearchResult:
        """Raises InvalidRequest, naming the field; UnknownDomain or UnknownVersion when another version is meant;
        DatastoreCorrupt for what is found damaged; DatastoreError when it is closed."""
        ...

    def passages(self, request: PassagesRequest) -> Sequence[Passage]:
        """One per entry, in their order. Raises InvalidRequest for an entry that the version does not have or that was
        removed from it; else as `search`."""
        ...

    def info(self, versions: Sequence[str], state: str = "ready") -> DomainInfo:
        """What the version is. versions: all of the domain on disk, oldest first."""
        ...

    def warm(self) -> None:
        """Make the first search as fast as the others. Raises as `search` does."""
        ...

    def close(self) -> None:
        """Let go of everything, while no search runs."""
        ...


class LanguageModelClient(Protocol):
    """A language model somewhere: in this process, or behind gRPC or HTTP.

    Behind a service every method raises Unavailable where nobody answers, Overloaded where the queue is full,
    DeadlineExceeded when the caller's time is over, and Unauthenticated or PermissionDenied for the key.
    """

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        """Raises InvalidRequest, naming the field, for what the model cannot take; TooLarge over a service's limit."""
        ...

    async def get_model(self) -> ModelInfo: ...
    async def get_tokenizer(self) -> str:
        """The tokenizer as the JSON of the tokenizers library; its sha256 is in ModelInfo."""
        ...

    async def get_chat_template(self) -> str | None:
        """The Jinja template that makes a prompt of messages; None where the model has none."""
        ...


class DatastoreClient(Protocol):
    """A set of domains somewhere. Behind a service its methods raise what those of LanguageModelClient do, too.

    UnknownDomain is raised for a domain that it does not have, UnknownVersion for a version that is not loaded.
    """

    async def search(self, request: SearchRequest) -> SearchResult:
        """Raises InvalidRequest, naming the field; TooLarge over a service's limit; DatastoreCorrupt for damage."""
        ...

    async def passages(self, request: PassagesRequest) -> Sequence[Passage]:
        """The text around each entry, in their order. Raises as `search`: InvalidRequest, too, for an entry that the
        version does not have or that was removed from it."""
        ...

    async def list_domains(self) -> Sequence[DomainInfo]:
        """Every domain, by name."""
        ...

    async def get_domain(self, domain: str, version: str | None = None) -> DomainInfo:
        """The domain as it is, or as that version of it is."""
        ...

    async def activate(self, domain: str, version: str) -> DomainInfo:
        """Make the version the current one. Raises Conflict or DatastoreError when it cannot be used."""
        ...


class DocumentsClient(Protocol):
    """A set of domains somewhere that documents can be added to and removed from, while they answer."""

    async def add_documents(self, domain: str, documents: Sequence[Document], *, replace: bool = False) -> DomainChange:
        """replace: documents that have the id of a new one are removed in the same step. Raises UnknownDomain; Conflict
        for an id that exists without `replace`, or when another change is under way; InvalidRequest for a document
        that cannot be taken; PermissionDenied without an admin key."""
        ...

    async def remove_documents(self, domain: str, ids: Sequence[str]) -> DomainChange:
        """Raises NotFound when one of the ids is no document: then nothing is removed. Else as `add_documents`."""
        ...
