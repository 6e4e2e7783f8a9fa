"""An MLP memory in use: keys in, log-probabilities out, with numpy alone; what it computes: knnlm/lm/students.py."""

import json
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from knnlm.errors import DatastoreCorrupt, InvalidRequest

Float32 = npt.NDArray[np.float32]

FILE = "mlp.safetensors"
EPSILON = np.float32(1e-6)
BLOCK_BYTES = 1 << 26  # of logits that are made at a time


class Mlp:
    """Safe for any number of threads."""

    def __init__(self, tensors: dict[str, Float32], layers: int) -> None:
        self._t = tensors
        self._layers = layers

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises DatastoreCorrupt for a file that holds no such net."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(folder / FILE, framework="numpy") as file:
                sizes = json.loads((file.metadata() or {})["mlp"])
                tensors = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
            made = cls(tensors, int(sizes["layers"]))
            with np.errstate(over="ignore", invalid="ignore"):
                made.log_probs(np.zeros((1, made.key_dim), np.float32))  # shows that all is there, and fits
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as err:
            raise DatastoreCorrupt(f"{folder / FILE} holds no MLP memory: {err}") from err
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


def _norm(h: Float32) -> Float32:
    normed: Float32 = h / np.sqrt(np.square(h).mean(axis=1, keepdims=True) + EPSILON)
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
