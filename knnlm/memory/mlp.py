"""An MLP memory in use: keys in, log-probabilities out, with numpy alone; what it computes: knnlm/lm/students.py."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from knnlm.errors import DatastoreCorrupt, InvalidRequest
from knnlm.memories import MLP_EPSILON, MLP_FILE

Float32 = npt.NDArray[np.float32]

DTYPES = {"F16": "<f2", "F32": "<f4"}
MAX_HEADER_BYTES = 1 << 20
BLOCK_BYTES = 1 << 26  # of logits that are made at a time


class Mlp:
    """Safe for any number of threads."""

    def __init__(self, tensors: dict[str, Float32], layers: int) -> None:
        self._t = tensors
        self._layers = layers

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the net in a folder. Raises DatastoreCorrupt for a file that holds something else."""
        try:
            sizes, tensors = _read(folder / MLP_FILE)
            made = cls(tensors, int(json.loads(sizes["mlp"])["layers"]))
            made.log_probs(np.zeros((1, made.key_dim), np.float32))  # shows that all is there, and fits
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as err:
            raise DatastoreCorrupt(f"{folder / MLP_FILE} holds no MLP memory: {err!r:.200}") from err
        return made

    @property
    def key_dim(self) -> int:
        return len(self._t["mean"])

    @property
    def vocab_size(self) -> int:
        return len(self._t["up.bias"])

    def log_probs(self, keys: npt.NDArray[np.floating]) -> Float32:
        """(n, V) of keys (n, d). Raises InvalidRequest for keys of another dimension."""
        logits = self._logits(self._hidden(keys))
        logits -= _log_sums(logits)
        return logits

    def target_log_probs(self, keys: npt.NDArray[np.floating], targets: npt.NDArray[np.integer]) -> Float32:
        """(n,) of one token for each of keys (n, d), a block of logits at a time."""
        hidden = self._hidden(keys)
        found = np.empty(len(hidden), np.float32)
        step = max(1, BLOCK_BYTES // (4 * self.vocab_size))
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            logits = self._logits(hidden[rows])
            own = np.take_along_axis(logits, targets[rows, None].astype(np.int64), axis=1)
            found[rows] = (own - _log_sums(logits))[:, 0]
        return found

    def _hidden(self, keys: npt.NDArray[np.floating]) -> Float32:
        if keys.ndim != 2 or keys.shape[1] != self.key_dim:
            raise InvalidRequest(f"keys must have shape (n, {self.key_dim}), got {keys.shape}", param="keys")
        t = self._t
        x: Float32 = (keys.astype(np.float32) - t["mean"]) / t["scale"]
        h = _silu(x @ t["first.weight"].T + t["first.bias"])
        for i in range(self._layers - 1):
            h = h + _silu(_norm(h) @ t[f"further.{i}.weight"].T + t[f"further.{i}.bias"])
        hidden: Float32 = _norm(h) @ t["down.weight"].T
        return hidden

    def _logits(self, hidden: Float32) -> Float32:
        logits: Float32 = hidden @ self._t["up.weight"].T + self._t["up.bias"]
        return logits


def _read(file: Path) -> tuple[Mapping[str, str], dict[str, Float32]]:
    """Metadata and tensors of a safetensors file, without the package of that name, which not every process has: the
    length of a header in 8 bytes, the header in JSON, then the numbers. Raises ValueError, KeyError or TypeError for
    what is none."""
    data = file.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    if begin > min(len(data), MAX_HEADER_BYTES):
        raise ValueError(f"its header would have {begin - 8} bytes, the file has {len(data)}")
    header = json.loads(data[8:begin])
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, record in header.items():
        low, high = record["data_offsets"]
        numbers = np.frombuffer(data[begin + low : begin + high], DTYPES[record["dtype"]])
        tensors[name] = numbers.reshape(record["shape"]).astype(np.float32)
    return metadata, tensors


def _norm(h: Float32) -> Float32:
    normed: Float32 = h / np.sqrt(np.square(h).mean(axis=1, keepdims=True) + np.float32(MLP_EPSILON))
    return normed


def _silu(x: Float32) -> Float32:
    # by tanh, which does not overflow
    activated: Float32 = x * (np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * x)))
    return activated


def _log_sums(logits: Float32) -> Float32:
    """(n, 1) log of the sum of exp over each row."""
    top = logits.max(axis=1, keepdims=True)
    sums: Float32 = np.log(np.exp(logits - top).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32) + top
    return sums
