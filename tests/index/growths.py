"""A base, what is added to it and removed from it, and what then remains: for tests of search."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from knnlm.datastore.reader import Datastore
from knnlm.messages import Document, ForwardRequest
from knnlm.neighbors import Neighbors
from knnlm.testing import ToyLanguageModel
from tests.grown import some_documents

DIM = 32
LM = ToyLanguageModel(key_dim=DIM)
BASE = some_documents("base", [150, 1, 300, 0, 250, 200, 300], seed=0)
ADDED = [some_documents("first", [120, 0, 80], seed=1), some_documents("second", [200], seed=2)]
REMOVED = (0, 3, 4, 7)  # three of the base and one that was added
EXACT = ["flat", "ivf8,flat", "ivf8,sq8", "hnsw16"]
REDUCED = ["pca16,ivf8,sq8+fp16", "pca16,pq8x4fs+fp16", "opq4_16,hnsw16+fp16"]
Growth = tuple[list[list[Document]], tuple[int, ...]]
GROWTHS: dict[str, Growth] = {
    "added": (ADDED, ()),
    "removed": ([], (0, 3, 4)),
    "both": (ADDED, REMOVED),
    "only the added remain": (ADDED, tuple(range(len(BASE)))),
    "only the base remains": (ADDED, (7, 8, 9, 10)),
}
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


def queries(n: int = 12) -> Float32:
    """Contexts of the model: near some keys, and equal to none."""
    tokens = LM.tokenizer.encode(some_documents("query", [n], seed=9)[0].text)[:n]
    found = LM.forward(ForwardRequest([tokens], [np.arange(n, dtype=np.int32)], keys=True)).keys
    assert found is not None
    return found.astype(np.float32)


def generous(recipe: str) -> dict[str, Any]:  # Any: of the field's type
    """So that everything is a candidate: what is then found is exact."""
    fields: dict[str, Any] = {"overfetch": 1e4, "ids": True}
    return fields | ({"nprobe": 8} if "ivf" in recipe else {}) | ({"ef_search": 5000} if "hnsw" in recipe else {})


def live(path: Path) -> Int64:
    """Entries that count: the number of the twin's entry i, in the version that has grown."""
    store = Datastore.open(path)
    gone = np.zeros(store.entries, np.bool_)
    for start, end in zip(*store.removed, strict=True):
        gone[start:end] = True
    return np.flatnonzero(~gone)


def remaining(growth: Growth) -> list[Document]:
    documents = [*BASE, *(d for segment in growth[0] for d in segment)]
    return [d for i, d in enumerate(documents) if i not in growth[1]]


def assert_same(found: Neighbors, expected: Neighbors, numbers: Int64) -> None:
    assert found.ids is not None
    assert expected.ids is not None
    np.testing.assert_array_equal(found.distances, expected.distances)
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.ids, np.where(expected.ids >= 0, numbers[expected.ids], -1))
