"""A version in one folder, the same in shards, and queries: what tests of shards share."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.index.build import build_index
from knnlm.messages import Document, SearchResult
from knnlm.testing import ToyLanguageModel
from tests.sharding import sharded

DIM = 16
WORDS = ("the", "cat", "sat", "on", "mat", "and", "dog", "log", "key", "value", "near", "far", "of", "a")


def documents(count: int = 60, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(count)]
    return [Document(f"d{i}", text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents in one folder, some 4,000 entries."""
    store = tmp_path_factory.mktemp("store")
    path = build(documents(), ToyLanguageModel(), Catalog(store), "toy")
    build_index(path, "ivf24")
    return path


@pytest.fixture(scope="module")
def in_shards(whole: Path) -> Path:
    return sharded(whole, 4)


def queries(n: int = 12, seed: int = 1) -> npt.NDArray[np.float32]:
    keys = build_queries(seed)
    return keys[:n]


def build_queries(seed: int) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (2 * rng.standard_normal((64, DIM))).astype(np.float32)


def equal(one: SearchResult, other: SearchResult) -> None:
    np.testing.assert_array_equal(one.neighbors.distances, other.neighbors.distances)
    np.testing.assert_array_equal(one.neighbors.values, other.neighbors.values)
    assert (one.neighbors.ids is None) == (other.neighbors.ids is None)
    if one.neighbors.ids is not None and other.neighbors.ids is not None:
        np.testing.assert_array_equal(one.neighbors.ids, other.neighbors.ids)
    assert (one.domain, one.passages.__len__()) == (other.domain, other.passages.__len__())
    for mine, others in zip(one.passages, other.passages, strict=True):
        assert [(p.document, p.entry, p.position, p.before.tolist(), p.after.tolist()) for p in mine] == [
            (p.document, p.entry, p.position, p.before.tolist(), p.after.tolist()) for p in others
        ]
