"""A memory in use, of either kind: log-probabilities over the vocabulary of the language model beside it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from knnlm.datastore.layout import Checksums
from knnlm.errors import InvalidRequest
from knnlm.lm.model import LanguageModel
from knnlm.memories import aligned
from knnlm.memory.manifest import MemoryManifest
from knnlm.memory.mlp import Mlp
from knnlm.messages import ForwardRequest, ModelInfo, required

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]


class OpenedMemory(ABC):
    """manifest: what it was made of; manifest.tune.lmbda is the weight that was best for it. vocab_size: width of its
    answers, that of the language model beside it. needs_keys: whether it reads that model's keys, rather than tokens.
    """

    needs_keys: bool

    def __init__(self, manifest: MemoryManifest, vocab_size: int) -> None:
        self.manifest = manifest
        self.vocab_size = vocab_size

    @abstractmethod
    def log_probs(
        self,
        tokens: Sequence[Int32],
        positions: Sequence[Int32],
        keys: npt.NDArray[np.floating] | None = None,
        targets: Int32 | None = None,
    ) -> Float32:
        """(n, vocab_size) after the n positions of these sequences, as in ForwardRequest; (n,) of `targets` (n,).

        keys: (n, d) the language model's keys of these positions. Raises InvalidRequest for what a ForwardRequest
        cannot have, and for keys that are missing or of another dimension.
        """


class DecoderMemory(OpenedMemory):
    """lm: the memory itself, a language model like any other."""

    needs_keys = False

    def __init__(self, manifest: MemoryManifest, vocab_size: int, lm: LanguageModel) -> None:
        super().__init__(manifest, vocab_size)
        self.lm = lm

    def log_probs(
        self,
        tokens: Sequence[Int32],
        positions: Sequence[Int32],
        keys: npt.NDArray[np.floating] | None = None,
        targets: Int32 | None = None,
    ) -> Float32:
        del keys
        if targets is not None and self.lm.info.vocab_size <= self.vocab_size:
            return required(self.lm.forward(ForwardRequest(tokens, positions, targets=targets)).target_log_probs)
        whole = required(self.lm.forward(ForwardRequest(tokens, positions, full=True)).log_probs)
        return chosen(aligned(whole, self.vocab_size).astype(np.float32), targets)


class MlpMemory(OpenedMemory):
    needs_keys = True

    def __init__(self, manifest: MemoryManifest, vocab_size: int, mlp: Mlp) -> None:
        super().__init__(manifest, vocab_size)
        self.mlp = mlp

    def log_probs(
        self,
        tokens: Sequence[Int32],
        positions: Sequence[Int32],
        keys: npt.NDArray[np.floating] | None = None,
        targets: Int32 | None = None,
    ) -> Float32:
        del tokens
        n = sum(map(len, positions))
        if keys is None or len(keys) != n:
            given = "none" if keys is None else len(keys)
            raise InvalidRequest(f"an mlp memory needs a key for each of {n} positions, got {given}", param="keys")
        return self.mlp.log_probs(keys) if targets is None else self.mlp.target_log_probs(keys, targets)


def open_memory(
    folder: str | Path, model: ModelInfo, *, device: str = "auto", dtype: str = "auto", check: Checksums = "small"
) -> OpenedMemory:
    """The memory in a folder, for use beside `model`.

    device, dtype: of a decoder. Raises DatastoreCorrupt for a folder that holds no memory or was changed,
    DatastoreMismatch for a model with another tokenizer, or, of an mlp, other keys; and as LanguageModel.load does.
    """
    path = Path(folder)
    manifest = MemoryManifest.open(path, check=check)
    manifest.refuse_other(model)
    if manifest.kind == "mlp":
        return MlpMemory(manifest, model.vocab_size, Mlp.load(path))
    lm = LanguageModel.load(str(path), device=device, dtype=dtype)
    return DecoderMemory(manifest, model.vocab_size, lm)


def chosen(log_probs: Float32, targets: Int32 | None) -> Float32:
    """All of (n, V), or (n,) of targets."""
    if targets is None:
        return log_probs
    return np.take_along_axis(log_probs, targets[:, None].astype(np.int64), axis=1)[:, 0]
