"""A toy language model and toy datastores for tests: numpy and the tokenizers library, no training, no files to fetch.

The toy behaves as a real model does where it matters: its key depends on every token before it and on its place in the
window, its answers do not depend on what else is in the batch, and it refuses what a real model refuses.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers

from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.lm.requests import check
from knnlm.messages import Document, ForwardRequest, ForwardResult, ModelInfo
from knnlm.tokenizer import Tokenizer

BOS, EOS = 0, 1

TEXTS = (
    "the cat sat on the mat and the dog sat on the log. the cat sat on the mat and looked at the dog.",
    "a nearest neighbour is the entry whose key is closest to the query; its value is the token that followed.",
    "x",
    "naïve café: the dog sat on the mat, the cat sat on the log, and nobody sat on the hat.",
)


def byte_tokenizer() -> Tokenizer:
    """258 tokens: <s> 0, </s> 1, then one for every byte."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={char: i for i, char in enumerate(["<s>", "</s>", *alphabet])}, merges=[])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend.to_str(), bos_token_id=BOS, eos_token_id=EOS)


class ToyLanguageModel:
    """A recurrence with random weights: recent tokens count most, so equal endings give near keys.

    Every step is elementwise: an answer is bit-equal alone and in a batch. padding: tokens that the model has beside
    those of its tokenizer.
    """

    def __init__(self, key_dim: int = 16, context_length: int = 32, seed: int = 0, padding: int = 0) -> None:
        self.tokenizer = byte_tokenizer()
        vocab_size = len(self.tokenizer) + padding
        rng = np.random.default_rng(seed)
        self._embedding = rng.standard_normal((vocab_size, key_dim))
        self._place = 0.05 * rng.standard_normal((context_length, key_dim))
        self._output = rng.standard_normal((vocab_size, key_dim))
        weights = b"".join(w.tobytes() for w in (self._embedding, self._place, self._output))
        self.info = ModelInfo(
            model_id="toy",
            architecture="toy",
            weights_sha256=hashlib.sha256(weights).hexdigest(),
            tokenizer_sha256=self.tokenizer.sha256,
            config_sha256=hashlib.sha256(b"toy").hexdigest(),
            vocab_size=vocab_size,
            context_length=context_length,
            key_function="toy",
            key_dim=key_dim,
            dtype="float32",
            device="cpu",
            bos_token_id=BOS,
            eos_token_id=EOS,
        )

    def forward(self, request: ForwardRequest) -> ForwardResult:
        """Raises InvalidRequest for whatever a real model would refuse."""
        check(request, vocab_size=self.info.vocab_size, context_length=self.info.context_length)
        hidden = self._hidden(request.tokens)  # (b, longest, d) float64
        rows = [hidden[i, positions] for i, positions in enumerate(request.positions)]
        keys = np.concatenate([np.empty((0, self.info.key_dim)), *rows])  # (n, d) float64
        log_probs = self._log_probs(keys) if any(replace(request, keys=False).wanted) else None
        top_tokens = top_log_probs = target_log_probs = entropy = largest = None
        if log_probs is not None and request.targets is not None:
            target_log_probs = np.take_along_axis(log_probs, request.targets[:, None].astype(np.int64), axis=1)[:, 0]
        if log_probs is not None and request.top_n:
            order = np.argsort(-log_probs, axis=1, kind="stable")[:, : request.top_n]
            top_tokens, top_log_probs = order.astype(np.int32), np.take_along_axis(log_probs, order, axis=1)
        if log_probs is not None and request.statistics:
            entropy = -(np.exp(log_probs, dtype=np.float64) * log_probs).sum(axis=1).astype(np.float32)
            largest = log_probs.max(axis=1)
        candidate_log_probs = log_power_sums = None
        if log_probs is not None and request.candidates is not None:
            chosen = [row[tokens.astype(np.int64)] for row, tokens in zip(log_probs, request.candidates, strict=True)]
            candidate_log_probs = np.concatenate([np.empty(0, np.float32), *chosen])
        if log_probs is not None and request.temperatures is not None:
            tempered = log_probs / request.temperatures.astype(np.float64)[:, None]
            log_power_sums = np.logaddexp.reduce(tempered, axis=1).astype(np.float32)
        return ForwardResult(
            log_probs=log_probs if request.full else None,
            target_log_probs=target_log_probs,
            top_tokens=top_tokens,
            top_log_probs=top_log_probs,
            keys=keys.astype(np.float32) if request.keys else None,
            entropy=entropy,
            largest_log_prob=largest,
            candidate_log_probs=candidate_log_probs,
            log_power_sums=log_power_sums,
            fingerprint=self.info.fingerprint,
            timings={"forward": 0.0},
        )

    def _hidden(self, sequences: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.float64]:
        longest = max((len(tokens) for tokens in sequences), default=0)
        padded = np.zeros((len(sequences), longest), np.int64)
        for row, tokens in zip(padded, sequences, strict=True):
            row[: len(tokens)] = tokens
        states = np.empty((*padded.shape, self.info.key_dim))
        state = np.zeros((len(sequences), self.info.key_dim))
        for j in range(longest):
            # rolling mixes the dimensions, so that the order of tokens matters
            state = np.tanh(0.6 * np.roll(state, 1, axis=1) + self._embedding[padded[:, j]] + self._place[j])
            states[:, j] = state
        return states

    def _log_probs(self, keys: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        logits = np.empty((len(keys), self.info.vocab_size))
        for row, key in zip(logits, keys, strict=True):
            row[:] = (self._output * key).sum(axis=1)
        logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
        return logits.astype(np.float32)


def toy_datastore(
    store: Path,
    lm: ToyLanguageModel | None = None,
    *,
    texts: Sequence[str] = TEXTS,
    domain: str = "toy",
    version: str = "v1",
    key_dtype: str = "float16",
    activate: bool = True,
) -> Path:
    """Build `texts` (documents "0", "1", ...) into store/domain/version, exact search, and return that folder."""
    catalog = Catalog(store)
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    path = build(documents, lm or ToyLanguageModel(), catalog, domain, version=version, key_dtype=key_dtype)
    if activate:
        catalog.activate(domain, version)
    return path
