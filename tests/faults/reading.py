"""A version that may be anything: it is opened and searched, or refused by a short KnnlmError, within bounds."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from knnlm.datastore.verify import verify
from knnlm.errors import KnnlmError
from knnlm.index.searcher import Searcher
from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions
from knnlm.v1 import datastore_pb2
from knnlm.wire import jsonable
from knnlm.wire.protos import to_proto
from tests.faults.damage import QUERIES

__all__ = ["bounded", "outcome"]

LONGEST = 2000  # characters of an error: it goes into a log line and into the metadata of an answer
SPARE = 96 << 20  # bytes beside what the files have: search buffers, Python's objects for what JSON says


@contextmanager
def bounded(most: int = SPARE) -> Iterator[None]:
    """Inside, at most so many bytes may be asked for at one moment by Python and numpy, touched or not."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= most, f"{peak >> 20} MiB were allocated, expected at most {most >> 20}"


def outcome(path: Path) -> str:
    """The message of the KnnlmError that refuses it, or "" when it is served. Any other exception is a failure.

    What it answers must fit into the messages that go over the wire, and be numbers.
    """
    list(verify(path))  # which raises nothing
    message = ""
    try:
        searcher = Searcher.open(path)
        try:
            _use(searcher)
        finally:
            searcher.close()
    except KnnlmError as err:
        message = err.message or "an error without a message"
    assert len(message) <= LONGEST, f"{len(message)} characters: {message[:200]}"
    return message


def _use(searcher: Searcher) -> None:
    searcher.warm()
    info = searcher.info(["v1"])
    to_proto(info, datastore_pb2.Domain)
    jsonable.to_json(info)
    for rescore in (None, True):
        request = SearchRequest("toy", QUERIES, SearchOptions(k=400, rescore=rescore), ids=True, passages=3)
        result = searcher.search(request)
        found = result.neighbors.values != -1
        assert np.isfinite(result.neighbors.distances[found]).all()
        assert (result.neighbors.distances[found] >= 0).all()
        to_proto(result, datastore_pb2.SearchResponse)
        jsonable.to_json(result, "list")
