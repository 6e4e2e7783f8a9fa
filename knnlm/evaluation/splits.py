"""Which documents are used for what: stored, fitted on, or reported on. Always whole documents, always the same way.

The part of a document follows from its id alone, so building, tuning and evaluating agree without a file between them,
in any order, on any machine, and a corpus that grows moves no document from one part to another.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from knnlm.datastore.reader import Datastore
from knnlm.errors import InvalidRequest
from knnlm.messages import Document
from knnlm.tokenizer import Tokenizer


class Part(StrEnum):
    """What a document is for. `ALL` is no part: every document."""

    ALL = "all"
    STORE = "store"
    TUNE = "tune"
    REPORT = "report"


SAMPLE_DOCUMENTS = 32  # a sample is drawn from at least this many, where there are more
BUCKETS = 10  # equal in size: the first is for reporting, the second for tuning, the rest is stored


@dataclass(frozen=True)
class Encoded:
    """A document as the model reads it. text: what is predicted, that is tokens[1:]."""

    id: str
    text: str
    tokens: npt.NDArray[np.int32]


def part_of(document_id: str) -> Part:
    """STORE for 8 of 10 ids, TUNE for one, REPORT for one, by their hash."""
    bucket = int.from_bytes(_digest(document_id)) % BUCKETS
    return {0: Part.REPORT, 1: Part.TUNE}.get(bucket, Part.STORE)


def select(documents: Iterable[Document], part: Part) -> Iterator[Document]:
    """The documents of one part, in their order."""
    return (d for d in documents if part is Part.ALL or part_of(d.id) is part)


def encode(documents: Iterable[Document], tokenizer: Tokenizer) -> list[Encoded]:
    """Each document whole, with its BOS. Those with nothing to predict (a single token) are left out."""
    encoded = []
    for document in documents:
        tokens = tokenizer.encode(document.text)
        if len(tokens) > 1:
            text = document.text if tokenizer.bos_token_id is not None else tokenizer.decode(tokens[1:])
            encoded.append(Encoded(document.id, text, tokens))
    return encoded


def unseen(documents: Sequence[Encoded], datastore: Path) -> list[Encoded]:
    """Those that the datastore version in folder `datastore` does not hold, neither by id nor by text.

    What was added to it counts, what was removed from it does not. What was fitted on documents that can be looked up
    word for word would be of no use for any other.
    """
    lengths = {len(d.tokens) for d in documents}
    store = Datastore.open(datastore)
    ids, texts = set(), set()
    for number, row in store.live_rows():
        ids.add(row.id)
        if row.tokens in lengths:
            texts.add(store.tokens_of(number).tobytes())
    store.close()
    return [d for d in documents if d.id not in ids and d.tokens.tobytes() not in texts]


def sample(documents: Sequence[Encoded], tokenizer: Tokenizer, max_tokens: int) -> list[Encoded]:
    """The beginnings of documents, `max_tokens` predicted tokens together, spread over all, in their order.

    Documents are chosen by the hash of their id, and none gives more than 1 / SAMPLE_DOCUMENTS of the tokens unless
    there are too few. All documents, whole, when they fit. Raises InvalidRequest for fewer than one token.
    """
    if max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, got {max_tokens}", param="max_tokens")
    lengths = np.array([len(d.tokens) - 1 for d in documents], np.int64)
    limit = -(-max_tokens // SAMPLE_DOCUMENTS)
    while np.minimum(lengths, limit).sum() < min(max_tokens, lengths.sum()):
        limit *= 2
    chosen: dict[int, Encoded] = {}
    left = max_tokens
    for i in sorted(range(len(documents)), key=lambda i: (_digest(f"sample {documents[i].id}"), i)):
        if left < 1:
            break
        chosen[i] = _cut(documents[i], tokenizer, min(left, limit) + 1)
        left -= len(chosen[i].tokens) - 1
    return [chosen[i] for i in sorted(chosen)]


def _cut(document: Encoded, tokenizer: Tokenizer, length: int) -> Encoded:
    """The document's first `length` tokens."""
    if len(document.tokens) <= length:
        return document
    tokens = document.tokens[:length]
    return Encoded(document.id, tokenizer.decode(tokens[1:]), tokens)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
