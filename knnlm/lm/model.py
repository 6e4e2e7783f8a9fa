"""A causal language model that answers forward requests: log-probabilities and keys of the positions that were asked.

Both come from one pass. Nothing is computed that was not asked: head and last FFN run over the asked positions alone,
the head in chunks of bounded size, and where only keys are wanted the pass ends at the keys. Log-probabilities equal
log_softmax(model(...).logits) of the plain model in transformers.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
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
from knnlm.lm.attention import continuing, layer_shapes
from knnlm.lm.capture import capture, capture_keys, encode, only_at
from knnlm.lm.prefixes import DEFAULT_BYTES, CachedSequence, Prefixes, passes
from knnlm.lm.requests import Feed, batches, plan
from knnlm.lm.slots import SlotShape
from knnlm.messages import ForwardRequest, ForwardResult, ModelInfo
from knnlm.tokenizer import Tokenizer

__all__ = ["LanguageModel"]

BATCH_TOKENS = 8192  # of one pass, padding included
CHUNK_BYTES = 64 << 20  # of float32 logits made at a time
# on a CPU, at most: what one step writes should still be in its cache when the next one reads it
CPU_BATCH_TOKENS = 2048
CPU_CHUNK_ROWS = 256


class LanguageModel:
    """`info` and `tokenizer` are what a datastore's manifest records of it. Callers from several threads take turns."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Tokenizer, info: ModelInfo, *, prefix_cache_bytes: int = DEFAULT_BYTES
    ) -> None:
        """model: in eval mode, whose facts are `info`. `load` is the usual way."""
        self.info = info
        self.tokenizer = tokenizer
        self._model = model
        self._base = model.base_model
        self._device = model.device  # looked up among the parameters each time it is asked for
        self._head = loading.output_head(model)
        self._architecture = find(model.config)
        self._site = self._architecture.site(info.key_function)
        self._ffn = self._architecture.site("ffn_input")
        self._alone = threading.Lock()  # hooks belong to a module: a second pass at the same time would run into them
        self.prefixes: Prefixes | None = None
        if prefix_cache_bytes:
            with torch.inference_mode():
                layers = layer_shapes(self._base, model.device)
            shape = SlotShape(layers, info.vocab_size, model.dtype, model.device)
            self.prefixes = Prefixes(shape, context_length=info.context_length, max_bytes=prefix_cache_bytes)

    @classmethod
    def load(
        cls,
        path_or_id: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        key_function: str = "ffn_input",
        prefix_cache_bytes: int = DEFAULT_BYTES,
    ) -> "LanguageModel":
        """The model of a Hugging Face folder or hub id with safetensors weights and a tokenizer.json.

        device: auto (CUDA when there is one), cpu, cuda, cuda:N. dtype: auto (float32 on CPU, bfloat16 on CUDA),
        float32, bfloat16, float16 (CUDA only). key_function: see knnlm/lm/architectures.py. prefix_cache_bytes: for
        keys and values of recent sequences, as requests with `cache` come; 0 keeps none. Raises InvalidRequest for
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
        return cls(model, tokenizer, info, prefix_cache_bytes=prefix_cache_bytes)

    def forward(self, request: ForwardRequest) -> ForwardResult:
        """What was asked, rows in the order it was asked. keys: float32 when the model is, else float16.

        timings: seconds in "forward" (the model) and "logits" (the head). Raises InvalidRequest for a request that is
        not as knnlm/messages.py says, ModelError when the model's numbers overflow its dtype or the keys float16.
        """
        feeds: Sequence[Feed] = plan(request, vocab_size=self.info.vocab_size, context_length=self.info.context_length)
        run = _Run(request, Answers(request, self.info))
        with self._alone, torch.inference_mode():
            if request.cache and self.prefixes is not None:
                feeds = self._continue(feeds, self.prefixes, run)
            for batch in batches(feeds, self._batch_tokens):
                run.clock()
                hidden = self._encode(batch, run)
                run.clock("forward")
                if hidden is not None:
                    self._score(hidden, _rows(batch), run)
                run.clock("logits")
        return ForwardResult(**run.answers.arrays, fingerprint=self.info.fingerprint, timings=run.seconds)

    def _continue(self, feeds: Sequence[Feed], prefixes: Prefixes, run: "_Run") -> Sequence[Feed]:
        """Answer for those that have a place in the prefix cache; the others."""
        try:
            kept, rest = prefixes.place(feeds, keys=run.request.keys)
            known = [one for one in kept if not one.new]
            self._repeat(known, prefixes, run)
            prefixes.commit(known)
            for batch in passes(kept, self._batch_tokens, alike=self._architecture.masks(self._base.config) == "own"):
                run.clock()
                hidden, feeds, slots = self._encode_new(batch, prefixes, run)
                run.clock("forward")
                if run.wants_logits:
                    self._score(hidden, _rows(feeds), run, slots)
                prefixes.commit(batch)
                run.clock("logits")
        except BaseException:
            prefixes.discard()
            raise
        return rest

    def _repeat(self, known: Sequence[CachedSequence], prefixes: Prefixes, run: "_Run") -> None:
        """Answer from the last log-probabilities of sequences of which nothing is new."""
        run.clock()
        rows = np.array([feed.first_row for one in known for feed in one.feeds], np.int64)
        slots = np.array([one.slot for one in known for _ in one.feeds], np.int64)
        for chunk in self._chunks(len(rows)):
            run.answers.fill(rows[chunk], prefixes.rows(slots[chunk]))
        run.clock("logits")

    @property
    def _on_cpu(self) -> bool:
        return self._device.type == "cpu"

    @property
    def _batch_tokens(self) -> int:
        return min(BATCH_TOKENS, CPU_BATCH_TOKENS) if self._on_cpu else BATCH_TOKENS

    def _chunks(self, rows: int) -> Iterator[slice]:
        step = max(1, CHUNK_BYTES // (4 * self.info.vocab_size))
        step = min(step, CPU_CHUNK_ROWS) if self._on_cpu else step
        return (slice(start, start + step) for start in range(0, rows, step))

    def _encode(self, batch: Sequence[Feed], run: "_Run") -> Tensor | None:
        """Final hidden states (m, h) of the batch's asked positions, feed after feed; their keys are answered.

        None when nothing but the keys is wanted.
        """
        ids = _padded([feed.tokens for feed in batch]).to(self._device)
        asked = np.concatenate([row * ids.shape[1] + feed.positions for row, feed in enumerate(batch)])
        # padding is on the right, so no mask: attention stays purely causal, its fastest form
        if not run.wants_logits:
            index = torch.from_numpy(asked).to(ids.device)
            run.keys[_rows(batch)] = self._key_array(capture_keys(self._base, self._site, ids).flatten(0, 1)[index])
            return None
        return self._hidden(ids, asked, _rows(batch), run)

    def _encode_new(
        self, batch: list[CachedSequence], prefixes: Prefixes, run: "_Run"
    ) -> tuple[Tensor, list[Feed], npt.NDArray[np.int64]]:
        """As `_encode`, of what is new in kept sequences; their feeds in the order of the rows; and for each row the
        slot of the sequence whose last token it belongs to, else -1."""
        arguments = continuing(self._base, self._architecture, prefixes, batch)
        ids = _padded([one.tokens[one.past :] for one in batch]).to(self._device)
        feeds = [feed for one in batch for feed in one.feeds]
        begins = [row * ids.shape[1] - one.past for row, one in enumerate(batch) for _ in one.feeds]
        asked = np.concatenate([begin + feed.positions for begin, feed in zip(begins, feeds, strict=True)])
        slots = np.full(len(asked), -1, np.int64)
        slots[np.cumsum([len(feed.positions) for feed in feeds]) - 1] = [one.slot for one in batch for _ in one.feeds]
        return self._hidden(ids, asked, _rows(feeds), run, arguments), feeds, slots

    def _hidden(
        self,
        ids: Tensor,
        asked: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        run: "_Run",
        arguments: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Final hidden states (m, h) of the positions `asked` of all in ids (b, t); the keys of rows (m,) are answered.

        arguments: of knnlm.lm.attention.continuing.
        """
        index = torch.from_numpy(asked).to(ids.device)
        everywhere = len(asked) == ids.numel()
        with nullcontext() if everywhere else only_at(self._base, self._ffn, ids, index):
            if run.request.keys:
                hidden, keys = capture(self._base, self._site, ids, continuing=arguments)
                run.keys[rows] = self._key_array(keys.flatten(0, 1)[index])
            else:
                hidden = encode(self._base, ids, continuing=arguments)
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

    def _score(
        self, hidden: Tensor, rows: npt.NDArray[np.int64], run: "_Run", slots: npt.NDArray[np.int64] | None = None
    ) -> None:
        """Answer what is asked of the log-probabilities of these rows. slots: where they are kept, -1 for nowhere."""
        for chunk in self._chunks(len(rows)):
            logits = self._architecture.adjust_logits(self._head(hidden[chunk]), self._model.config)
            log_probs = torch.log_softmax(logits.float(), -1)
            if slots is not None and self.prefixes is not None:
                self.prefixes.keep_rows(slots[chunk], log_probs)
            run.answers.fill(rows[chunk], log_probs)


@dataclass
class _Run:
    """A request under way."""

    request: ForwardRequest
    answers: Answers
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "logits": 0.0})
    _since: float = 0.0

    def __post_init__(self) -> None:
        self.wants_logits = any(replace(self.request, keys=False).wanted)

    @property
    def keys(self) -> npt.NDArray[Any]:
        return self.answers.arrays["keys"]

    def clock(self, stage: str | None = None) -> None:
        """Count the time since the last call for a stage."""
        now = time.perf_counter()
        if stage is not None:
            self.seconds[stage] += now - self._since
        self._since = now


def _rows(feeds: Sequence[Feed]) -> npt.NDArray[np.int64]:
    return np.concatenate([feed.first_row + np.arange(len(feed.positions)) for feed in feeds])


def _padded(sequences: Sequence[npt.NDArray[np.int64]]) -> Tensor:
    """(b, longest) int64, with zeros on the right."""
    ids = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    for row, tokens in zip(ids, sequences, strict=True):
        row[: len(tokens)] = tokens
    return torch.from_numpy(ids)
