"""A version of shards, all of them opened in this process: searched one after another, merged by distance."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from knnlm.datastore.layout import Checksums
from knnlm.datastore.manifest import IndexRecord, Manifest
from knnlm.datastore.reader import Datastore, load_shard
from knnlm.errors import DatastoreCorrupt
from knnlm.index.contract import Index
from knnlm.index.requests import check_request
from knnlm.index.searcher import Searcher
from knnlm.index.sharding import Sharding, ShardResult
from knnlm.messages import DomainInfo, Memory, ModelInfo, Passage, PassagesRequest, SearchRequest, SearchResult

__all__ = ["OpenedSearcher", "Shard", "ShardedSearcher", "open_searcher"]


class Shard:
    """One shard of a version, opened."""

    def __init__(self, searcher: Searcher) -> None:
        self.searcher = searcher

    @classmethod
    def open(cls, path: Path, manifest: Manifest, number: int, *, index: str | None = None, **options: Any) -> Self:
        """Shard `number` of the version in folder `path`, whose manifest this is. index, options: as in Searcher.open.

        Raises as Searcher.open does; DatastoreCorrupt when it, or its index, is not what the version has.
        """
        folder, wanted = path / manifest.shards[number].name, manifest.index_of(index)
        mine = load_shard(path, manifest, manifest.shards[number])
        found = next((i for i in mine.indexes if _alike(i, wanted)), None)
        if found is None and wanted.file is not None:
            raise DatastoreCorrupt(
                f"{folder} has no index {wanted.recipe} of what was trained for {manifest.domain} {manifest.version}: "
                f"`knnlm index build {manifest.domain} --version {manifest.version}` makes it again"
            )
        return cls(Searcher.open(folder, index=wanted.recipe, **options))

    def search(self, request: SearchRequest) -> ShardResult:
        """Raises as Searcher.search does, but for excluded documents that it does not have."""
        documents = self.searcher.datastore.documents if request.options.exclude_documents else None
        unknown = tuple(
            name for name in request.options.exclude_documents if documents is None or not len(documents.numbers(name))
        )
        if unknown:
            known = tuple(name for name in request.options.exclude_documents if name not in unknown)
            request = replace(request, options=replace(request.options, exclude_documents=known))
        return ShardResult(self.searcher.search(request), unknown)

    def passages(self, request: PassagesRequest) -> list[Passage]:
        return self.searcher.passages(request)

    def close(self) -> None:
        self.searcher.close()


class ShardedSearcher:
    """Searches as a Searcher does, and answers what one index of all keys would. `close` when no search runs."""

    def __init__(self, datastore: Datastore, shards: Sequence[Shard], recipe: str) -> None:
        self.datastore = datastore
        self.recipe = recipe
        self._shards = tuple(shards)
        self._sharding = Sharding(datastore.manifest)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        index: str | None = None,
        memory_limit: int | None = None,
        expect: ModelInfo | None = None,
        check: Checksums = "none",
        **options: Any,
    ) -> Self:
        """The version of shards in folder `path`. Options and what is raised: as in Searcher.open, and DatastoreCorrupt
        for a shard that is missing or another one."""
        datastore = Datastore.open(path, expect=expect, check=check)
        manifest = datastore.manifest
        recipe = manifest.index_of(index).recipe
        with ExitStack() as opened:
            shards: list[Shard] = []
            for number in range(len(manifest.shards)):
                left = None if memory_limit is None else memory_limit - sum(s.searcher.held_bytes for s in shards)
                shards.append(Shard.open(path, manifest, number, index=recipe, memory_limit=left, **options))
                opened.callback(shards[-1].close)
            opened.pop_all()
        return cls(datastore, shards, recipe)

    @property
    def manifest(self) -> Manifest:
        return self.datastore.manifest

    @property
    def index(self) -> Index:
        """The index of the first shard, whose options and defaults are those of all."""
        return self._shards[0].searcher.index

    @property
    def memory(self) -> Memory:
        parts = [shard.searcher.memory for shard in self._shards]
        sizes = {name: sum(getattr(part, name) for part in parts) for name in ("index_bytes", "keys_bytes")}
        return replace(parts[0], **sizes)

    @property
    def memory_bytes(self) -> int:
        """Bytes that the indexes occupy, file maps included."""
        return sum(shard.searcher.memory_bytes for shard in self._shards)

    @property
    def held_bytes(self) -> int:
        return sum(shard.searcher.held_bytes for shard in self._shards)

    def search(self, request: SearchRequest) -> SearchResult:
        """Raises as Searcher.search does."""
        check_request(request, self.manifest, self.index, self.recipe)
        parts = self._sharding.split(request)
        return self._sharding.merge(request, parts, (self._shards[part.shard].search(part.request) for part in parts))

    def passages(self, request: PassagesRequest) -> list[Passage]:
        """Raises as Searcher.passages does."""
        parts = self._sharding.split_lookup(request)
        found = {number: self._shards[number].passages(part) for number, part in parts.items()}
        return self._sharding.merge_lookup(request, found)

    def info(self, versions: Sequence[str], state: str = "ready") -> DomainInfo:
        return self.manifest.info(self.recipe, self.memory, versions, state)

    def warm(self) -> None:
        for shard in self._shards:
            shard.searcher.warm()

    def close(self) -> None:
        for shard in self._shards:
            shard.close()
        self.datastore.close()


OpenedSearcher = Searcher | ShardedSearcher


def open_searcher(path: Path, **options: Any) -> OpenedSearcher:
    """The version in folder `path`, of shards or not. options, and what is raised: as in Searcher.open."""
    if Manifest.load(path).shards:
        return ShardedSearcher.open(path, **options)
    return Searcher.open(path, **options)


def _alike(mine: IndexRecord, whole: IndexRecord) -> bool:
    """Whether a shard's index is the one that the version has."""
    return mine.model_copy(update={"file": whole.file}) == whole
