"""A causal language model that answers forward requests: log-probabilities and keys of the positions that were asked.

Both come from one pass. Nothing is computed that was not asked: head and last FFN run over the asked positions alone,
the head in chunks of bounded size, and where only keys are wanted the pass ends at the keys. Log-probabilities equal
log_softmax(model(...).logits) of the plain model in transformers.
"""

import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from knnlm.errors import ModelError
from knnlm.lm import loading
from knnlm.lm.answers import Answers
from knnlm.lm.architectures import find
from knnlm.lm.capture import capture, capture_keys, encode, only_at
from knnlm.lm.requests import Feed, batches, plan
from knnlm.messages import ForwardRequest, ForwardResult, ModelInfo
from knnlm.tokenizer import Tokenizer

__all__ = ["LanguageModel"]

BATCH_TOKENS = 8192  # of one pass, padding included
CHUNK_BYTES = 64 << 20  # of float32 logits made at a time
# on a CPU, at most: what one step writes should still be in its cache when the next one reads it
CPU_BATCH_TOKENS = 2048
CPU_CHUNK_ROWS = 256

Arrays = dict[str, npt.NDArray[Any]]  # by their names in ForwardResult; n rows each


class LanguageModel:
    """`info` and `tokenizer` are what a datastore's manifest records of it. Callers from several threads take turns."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, info: ModelInfo) -> None:
        """model: in eval mode, whose facts are `info`. `load` is the usual way."""
        self.info = info
        self.tokenizer = tokenizer
        self._model = model
        self._base = model.base_model
        self._head = loading.output_head(model)
        self._architecture = find(model.config)
        self._site = self._architecture.site(info.key_function)
        self._ffn = self._architecture.site("ffn_input")
        self._alone = threading.Lock()  # hooks belong to a module: a second pass at the same time would run into them

    @classmethod
    def load(
        cls, path_or_id: str, *, device: str = "auto", dtype: str = "auto", key_function: str = "ffn_input"
    ) -> "LanguageModel":
        """The model of a Hugging Face folder or hub id with safetensors weights and a tokenizer.json.

        device: auto (CUDA when there is one), cpu, cuda, cuda:N. dtype: auto (float32 on CPU, bfloat16 on CUDA),
        float32, bfloat16, float16 (CUDA only). key_function: see knnlm/lm/architectures.py. Raises InvalidRequest for
        a value that is none of these, UnknownArchitecture for a model without a row there, ModelError for a model that
        is missing, incomplete or no decoder, or whose architecture has no such key.
        """
        target = loading.pick_device(device)
        dtype = loading.pick_dtype(dtype, target)
        folder = loading.resolve(path_or_id)
        config = loading.load_config(folder)
        site = find(config).site(key_function)
        context_length = loading.context_length(config)
        config_sha256 = loading.config_sha256(config)
        model = loading.load_model(folder, config, target, getattr(torch, dtype))  # what can be wrong is asked before
        vocab_size = loading.output_head(model).out_features
        tokenizer = loading.load_tokenizer(folder, vocab_size=vocab_size)
        with torch.inference_mode():  # one token shows that the site exists, and the width of its keys
            _, keys = capture(model.base_model, site, torch.zeros((1, 1), dtype=torch.int64, device=target))
        info = ModelInfo(
            model_id=folder.resolve().name if Path(path_or_id).expanduser().is_dir() else path_or_id,
            architecture=config.model_type,
            weights_sha256=loading.weights_sha256(folder),
            tokenizer_sha256=tokenizer.sha256,
            config_sha256=config_sha256,
            vocab_size=vocab_size,
            context_length=context_length,
            key_function=key_function,
            key_dim=keys.shape[-1],
            dtype=dtype,
            device=str(target),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return cls(model, tokenizer, info)

    def forward(self, request: ForwardRequest) -> ForwardResult:
        """What was asked, rows in the order it was asked. keys: float32 when the model is, else float16.

        timings: seconds in "forward" (the model) and "logits" (the head). Raises InvalidRequest for a request that is
        not as knnlm/messages.py says, ModelError when the model's numbers overflow its dtype or the keys float16.
        """
        feeds = plan(request, vocab_size=self.info.vocab_size, context_length=self.info.context_length)
        answers = Answers(request, self.info)
        out = answers.arrays
        wants_logits = any(replace(request, keys=False).wanted)
        seconds = {"forward": 0.0, "logits": 0.0}
        with self._alone, torch.inference_mode():
            for batch in batches(feeds, min(BATCH_TOKENS, CPU_BATCH_TOKENS) if self._on_cpu else BATCH_TOKENS):
                started = time.perf_counter()
                rows = np.concatenate([feed.first_row + np.arange(len(feed.positions)) for feed in batch])  # (m,)
                hidden = self._encode(batch, rows, out, keys_alone=not wants_logits)  # (m, h)
                encoded = time.perf_counter()
                if hidden is not None:
                    self._score(hidden, rows, answers)
                seconds["forward"] += encoded - started
                seconds["logits"] += time.perf_counter() - encoded
        return ForwardResult(**out, fingerprint=self.info.fingerprint, timings=seconds)

    @property
    def _on_cpu(self) -> bool:
        return self._model.device.type == "cpu"

    def _encode(
        self, batch: Sequence[Feed], rows: npt.NDArray[np.int64], out: Arrays, *, keys_alone: bool
    ) -> Tensor | None:
        """Final hidden states (m, h) of the batch's asked positions, feed after feed; their keys go to out[rows].

        keys_alone: nothing but the keys is wanted, and None is returned.
        """
        width = len(batch[0].tokens)  # the longest comes first
        ids = np.zeros((len(batch), width), np.int64)
        for row, feed in enumerate(batch):
            ids[row, : len(feed.tokens)] = feed.tokens
        asked = np.concatenate([row * width + feed.positions for row, feed in enumerate(batch)])
        index = torch.from_numpy(asked).to(self._model.device)
        input_ids = torch.from_numpy(ids).to(self._model.device)
        # padding is on the right, so no mask: attention stays purely causal, its fastest form
        if keys_alone:
            out["keys"][rows] = self._key_array(capture_keys(self._base, self._site, input_ids).flatten(0, 1)[index])
            return None
        everywhere = len(asked) == ids.size
        with nullcontext() if everywhere else only_at(self._base, self._ffn, input_ids, index):
            if "keys" in out:
                hidden, keys = capture(self._base, self._site, input_ids)
                out["keys"][rows] = self._key_array(keys.flatten(0, 1)[index])
            else:
                hidden = encode(self._base, input_ids)
        hidden = hidden.flatten(0, 1)[index]
        if not hidden.isfinite().all():
            raise ModelError(f"numbers of this model overflow {self.info.dtype}: load it as bfloat16 or float32")
        return hidden

    def _key_array(self, keys: Tensor) -> npt.NDArray[np.floating]:
        """(m, d) float32, or float16 checked against its range: bfloat16 reaches further."""
        half = self.info.dtype != "float32"
        found: npt.NDArray[np.floating] = keys.to(torch.float16 if half else torch.float32).cpu().numpy()
        if not np.isfinite(found).all():
            what = "pass 65504, the largest float16: load it as float32" if half else "are not finite"
            raise ModelError(f"keys ({self.info.key_function}) of this model {what}")
        return found

    def _score(self, hidden: Tensor, rows: npt.NDArray[np.int64], answers: Answers) -> None:
        """Fill what is asked of the log-probabilities of these rows."""
        step = max(1, CHUNK_BYTES // (4 * self.info.vocab_size))
        step = min(step, CPU_CHUNK_ROWS) if self._on_cpu else step
        for start in range(0, len(rows), step):
            chunk = slice(start, start + step)
            logits = self._architecture.adjust_logits(self._head(hidden[chunk]), self._model.config)
            answers.fill(rows[chunk], torch.log_softmax(logits.float(), -1))
