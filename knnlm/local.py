"""Objects of this process, and services that are named, as the clients that the flow asks: what Pipeline runs over."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from knnlm.errors import Conflict, UnknownDomain, UnknownVersion
from knnlm.messages import (
    DomainInfo,
    ForwardRequest,
    ForwardResult,
    ModelInfo,
    Passage,
    PassagesRequest,
    SearchRequest,
    SearchResult,
)
from knnlm.protocols import LanguageModel, Searching

if TYPE_CHECKING:
    from knnlm.clients.rpc import GrpcLanguageModel


class CalledModel:
    """An lm service as a LanguageModelClient for any event loop: connected to for each call."""

    def __init__(self, target: str) -> None:
        self._target = target

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        async with self._client() as client:
            return await client.forward(request)

    async def get_model(self) -> ModelInfo:
        async with self._client() as client:
            return await client.get_model()

    async def get_tokenizer(self) -> str:
        async with self._client() as client:
            return await client.get_tokenizer()

    async def get_chat_template(self) -> str | None:
        async with self._client() as client:
            return await client.get_chat_template()

    def _client(self) -> "GrpcLanguageModel":
        from knnlm.clients.rpc import GrpcLanguageModel

        return GrpcLanguageModel(self._target)


class LocalLanguageModel:
    """A model of this process as a LanguageModelClient. Calls run on a thread, so that a search can run meanwhile."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        return await asyncio.to_thread(self._lm.forward, request)

    async def get_model(self) -> ModelInfo:
        return self._lm.info

    async def get_tokenizer(self) -> str:
        return self._lm.tokenizer.json

    async def get_chat_template(self) -> str | None:
        return self._lm.tokenizer.chat_template


class LocalDatastore:
    """Opened searchers as a DatastoreClient. Each domain stays on the version it was opened with."""

    def __init__(self, searchers: Mapping[str, Searching]) -> None:
        self._searchers = searchers

    async def search(self, request: SearchRequest) -> SearchResult:
        return await asyncio.to_thread(self._searcher(request.domain).search, request)

    async def passages(self, request: PassagesRequest) -> Sequence[Passage]:
        return await asyncio.to_thread(self._searcher(request.domain).passages, request)

    async def list_domains(self) -> Sequence[DomainInfo]:
        return [await self.get_domain(domain) for domain in sorted(self._searchers)]

    async def get_domain(self, domain: str, version: str | None = None) -> DomainInfo:
        info = self._searcher(domain).info(())
        if version not in (None, info.version):
            raise UnknownVersion(
                f"domain {domain} was opened with version {info.version}, not {version}", param="version"
            )
        return replace(info, versions=(info.version,))

    async def activate(self, domain: str, version: str) -> DomainInfo:
        info = await self.get_domain(domain)
        raise Conflict(f"domain {domain} was opened with version {info.version}: open {version} instead")

    def _searcher(self, domain: str) -> Searching:
        if domain not in self._searchers:
            known = ", ".join(sorted(self._searchers)) or "none"
            raise UnknownDomain(f"unknown domain {domain!r}; opened: {known}", param="domain")
        return self._searchers[domain]
