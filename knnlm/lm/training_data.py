"""What a small language model is trained on: documents split, tokenized into one row, and cut into windows.

Everything is derived from the documents, the settings and the seed, so that a run can be repeated and continued.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from knnlm.messages import Document

BOS = "<|endoftext|>"
HELD_OUT_BUCKETS = 50  # a document whose hash falls into the first is held out: 2 %


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(to train on, held out), by a hash of the document's id."""
    train_docs: list[Document] = []
    held: list[Document] = []
    for document in documents:
        bucket = int.from_bytes(hashlib.sha256(document.id.encode()).digest()[:2]) % HELD_OUT_BUCKETS
        (held if bucket == 0 else train_docs).append(document)
    return train_docs, held


def learn_tokenizer(documents: Sequence[Document], vocab_size: int, path: Path) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` tokens, BOS among them, kept at `path`; read from there if it is there."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((d.text for d in documents), trainer)
    backend.save(str(path))
    return backend


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> npt.NDArray[np.int32]:
    """All documents in one row, each behind a BOS: (tokens,) int32."""
    bos = tokenizer.token_to_id(BOS)
    parts: list[npt.NDArray[np.int32]] = []
    for start in range(0, len(documents), 256):
        encodings = tokenizer.encode_batch([d.text for d in documents[start : start + 256]])
        parts.extend(np.array([bos, *encoding.ids], np.int32) for encoding in encodings)
    return np.concatenate(parts)


def windows(length: int, context: int, rows: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """(rows,) start offsets of windows for each step, without end: every epoch shifts the grid and shuffles it."""
    epoch = 0
    pending = np.empty(0, np.int64)
    while True:
        rng = np.random.default_rng((seed, epoch))
        shift = int(rng.integers(context))
        starts = np.arange(shift, length - context, context)
        pending = np.concatenate([pending, rng.permutation(starts)])
        while len(pending) >= rows:
            yield pending[:rows]
            pending = pending[rows:]
        epoch += 1
