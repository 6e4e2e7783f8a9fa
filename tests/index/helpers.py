"""A datastore with keys of one's choice, and the brute-force twin of every search."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.messages import Document, ForwardRequest, ForwardResult
from knnlm.testing import ToyLanguageModel
from tests.grown import emptied

Floats = npt.NDArray[np.floating]


class Given(ToyLanguageModel):
    """Gives the keys it was given, in order, whatever the tokens; for one document in one window."""

    def __init__(self, keys: Floats) -> None:
        super().__init__(key_dim=keys.shape[1], context_length=len(keys) + 2)
        self._keys = keys

    def forward(self, request: ForwardRequest) -> ForwardResult:
        return ForwardResult(keys=self._keys[request.positions[0]])


def datastore(store: Path, keys: Floats, *, key_dtype: str = "float32", version: str = "v1") -> Path:
    """One document whose entry i has keys[i] and the value i % 200 + 20, about."""
    if not len(keys):
        return emptied(datastore(store, np.zeros((1, keys.shape[1])), key_dtype=key_dtype, version=version))
    documents = [Document("only", "".join(chr(33 + i % 90) for i in range(len(keys))))]
    lm = Given(np.asarray(keys, np.float32))
    return build(
        documents, lm, Catalog(store), "toy",
        version=version, context_length=lm.info.context_length, key_dtype=key_dtype, batch_tokens=1 << 30,
    )  # fmt: skip


def clustered(n: int, dim: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """As keys of a model are: around a few dozen centres, so that lists mean something."""
    rng = np.random.default_rng(seed)
    centres = 3 * rng.standard_normal((32, dim))
    return (centres[rng.integers(0, 32, n)] + rng.standard_normal((n, dim))).astype(np.float32)


def brute_force(keys: Floats, queries: Floats, k: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Squared L2 distances, ascending, and entry numbers; float64 from the differences, nothing cancels."""
    difference = queries[:, None].astype(np.float64) - keys[None].astype(np.float64)
    distances = np.square(difference).sum(axis=2)
    ids = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, ids, axis=1), ids
