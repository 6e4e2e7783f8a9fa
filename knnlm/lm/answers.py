"""The arrays of an answer to a ForwardRequest, filled from rows of log-probabilities."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from knnlm.messages import ForwardRequest, ModelInfo

Rows = npt.NDArray[np.int64]


class Answers:
    """Makes the answer to one request. arrays: those that it asks for, by their names in ForwardResult, with a row for
    each of its n positions; not filled at first."""

    def __init__(self, request: ForwardRequest, info: ModelInfo) -> None:
        """request: checked, as knnlm.lm.requests.check does."""
        n = sum(len(positions) for positions in request.positions)
        self._request = request
        self.arrays: dict[str, npt.NDArray[Any]] = {}  # Any: float32, int32 or float16
        if request.full:
            self.arrays["log_probs"] = np.empty((n, info.vocab_size), np.float32)
        if request.targets is not None:
            self._targets = np.asarray(request.targets, np.int64)
            self.arrays["target_log_probs"] = np.empty(n, np.float32)
        if request.top_n:
            self.arrays["top_tokens"] = np.empty((n, request.top_n), np.int32)
            self.arrays["top_log_probs"] = np.empty((n, request.top_n), np.float32)
        if request.statistics:
            self.arrays["entropy"] = np.empty(n, np.float32)
            self.arrays["largest_log_prob"] = np.empty(n, np.float32)
        if request.candidates is not None:
            self._counts = np.array([len(tokens) for tokens in request.candidates], np.int64)
            self._starts = np.cumsum(self._counts) - self._counts
            self._candidates = np.concatenate([np.empty(0, np.int64), *request.candidates]).astype(np.int64, copy=False)
            self.arrays["candidate_log_probs"] = np.empty(len(self._candidates), np.float32)
        if request.temperatures is not None:
            self._temperatures = np.asarray(request.temperatures, np.float32)
            self.arrays["log_power_sums"] = np.empty(n, np.float32)
        if request.keys:
            key_dtype = np.float32 if info.dtype == "float32" else np.float16
            self.arrays["keys"] = np.empty((n, info.key_dim), key_dtype)

    def fill(self, rows: Rows, log_probs: Tensor) -> None:
        """Fill in what is asked of some positions. rows: (m,), their places among the n. log_probs: (m, V) float32,
        overwritten here."""
        request, device = self._request, log_probs.device
        if request.full:
            self._put("log_probs", rows, log_probs)
        if request.targets is not None:
            wanted = torch.from_numpy(self._targets[rows])[:, None].to(device)
            self._put("target_log_probs", rows, log_probs.gather(1, wanted)[:, 0])
        if request.top_n:
            best = log_probs.topk(request.top_n)
            self._put("top_tokens", rows, best.indices)
            self._put("top_log_probs", rows, best.values)
        if request.candidates is not None:
            counts = self._counts[rows]
            # where each row's candidates begin, less how many stand before them here
            begins = self._starts[rows] - np.cumsum(counts) + counts
            places = np.repeat(begins, counts) + np.arange(counts.sum())
            row = torch.from_numpy(np.repeat(np.arange(len(rows)), counts)).to(device)
            wanted = torch.from_numpy(self._candidates[places]).to(device)
            self._put("candidate_log_probs", places, log_probs[row, wanted])
        if request.temperatures is not None:
            temperatures = torch.from_numpy(self._temperatures[rows])[:, None].to(device)
            largest = log_probs.amax(-1, keepdim=True)
            sums = ((log_probs - largest) / temperatures).exp_().sum(-1, keepdim=True)
            self._put("log_power_sums", rows, (sums.log() + largest / temperatures)[:, 0])
        if request.statistics:
            self._put("largest_log_prob", rows, log_probs.amax(-1))
            p = log_probs.exp_()  # in place: read last
            self._put("entropy", rows, torch.special.entr(p, out=p).sum(-1))

    def _put(self, name: str, rows: Rows, values: Tensor) -> None:
        self.arrays[name][rows] = values.cpu().numpy()
