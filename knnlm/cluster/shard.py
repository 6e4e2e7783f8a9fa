"""One shard of a version as a deployment of Ray Serve: opened as in one process, asked with bytes.

Requests and answers travel as the messages of knnlm/v1, packed; an answer begins with a header in JSON. Nothing of Ray
is imported here.
"""

import asyncio
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from knnlm.datastore.manifest import Manifest
from knnlm.errors import KnnlmError, Unavailable
from knnlm.index.searcher import Searcher
from knnlm.index.sharded_searcher import Shard
from knnlm.messages import PassagesRequest, PassagesResult, SearchRequest
from knnlm.v1 import datastore_pb2
from knnlm.wire.protos import from_proto, to_proto

HEADER_BYTES = 4  # the length of the header, little-endian, before it


def pack(header: Mapping[str, Any], body: bytes = b"") -> bytes:  # Any: JSON
    text = json.dumps(header).encode()
    return len(text).to_bytes(HEADER_BYTES, "little") + text + body


def unpack(answer: bytes) -> tuple[dict[str, Any], bytes]:  # Any: JSON
    """The header and the body of what `pack` made."""
    end = HEADER_BYTES + int.from_bytes(answer[:HEADER_BYTES], "little")
    return json.loads(answer[HEADER_BYTES:end]), answer[end:]


class ShardReplica:
    """Works on one call at a time; further ones wait in threads, and are not begun when their caller has left
    meanwhile. A KnnlmError becomes a header with `error`."""

    def __init__(self, path: str, number: int, opening: Mapping[str, Any], others: Sequence[object] = ()) -> None:
        """path: the version's folder. number: of the shard; 0 of a version without shards. opening: the options of
        Searcher.open, as which it raises. others: the other deployments of the application."""
        del others
        manifest = Manifest.load(Path(path))
        if manifest.shards:
            self._shard = Shard.open(Path(path), manifest, number, **opening)
        else:
            self._shard = Shard(Searcher.open(Path(path), **opening))
        self._shard.searcher.warm()
        self._working = threading.Lock()

    async def search(self, request: bytes) -> bytes:
        """request: a SearchRequest of this shard's entries. Answers a SearchResponse; header: `unknown`, the documents
        to exclude that it does not have."""
        return await self._answer(self._search, request)

    async def passages(self, request: bytes) -> bytes:
        """request: a GetPassagesRequest of this shard's entries. Answers a GetPassagesResponse."""
        return await self._answer(self._passages, request)

    async def describe(self, request: bytes) -> bytes:  # noqa: ARG002  as the others are asked
        """Answers no body; header: `memory`, the fields of messages.Memory."""
        return pack({"memory": vars(self._shard.searcher.memory)})

    async def _answer(self, work: Callable[[bytes], bytes], request: bytes) -> bytes:
        left = threading.Event()
        try:
            return await asyncio.to_thread(self._answered, work, request, left)
        except asyncio.CancelledError:  # the thread goes on, but finds that nobody waits
            left.set()
            raise

    def _answered(self, work: Callable[[bytes], bytes], request: bytes, left: threading.Event) -> bytes:
        try:
            with self._working:
                return b"" if left.is_set() else work(request)
        except MemoryError as err:
            return _refused(Unavailable(f"memory ended while the shard worked: {err}"))
        except KnnlmError as err:
            return _refused(err)

    def _search(self, request: bytes) -> bytes:
        asked = from_proto(SearchRequest, datastore_pb2.SearchRequest.FromString(request))
        found = self._shard.search(asked)
        message = to_proto(found.result, datastore_pb2.SearchResponse)
        return pack({"unknown": found.unknown_documents}, message.SerializeToString())

    def _passages(self, request: bytes) -> bytes:
        asked = from_proto(PassagesRequest, datastore_pb2.GetPassagesRequest.FromString(request))
        found = PassagesResult(asked.domain, asked.version, self._shard.passages(asked))
        return pack({}, to_proto(found, datastore_pb2.GetPassagesResponse).SerializeToString())


def _refused(err: KnnlmError) -> bytes:
    return pack({"error": {"code": err.code, "message": err.message, "param": err.param}})
