"""The first phase of a build: documents to tokens.npy and documents.jsonl, as a stream.

A document is tokenized whole, so memory is bounded by the longest one. Afterwards the number of entries is known
exactly, and the documents themselves are not needed again: only their digest is compared when a build is resumed.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from knnlm.datastore.arrays import ArrayStream
from knnlm.datastore.document_table import Row
from knnlm.datastore.files import disk_errors, sync_folder, written
from knnlm.datastore.layout import DOCUMENTS, TOKENS, Record
from knnlm.datastore.text import check_id
from knnlm.errors import DatastoreError, InvalidRequest
from knnlm.messages import Document
from knnlm.tokenizer import Tokenizer


class Sources(Record):
    """What the documents were. sha256: of all ids and texts, see `sources_digest`."""

    sha256: str
    documents: int
    tokens: int
    entries: int


def sources_digest(documents: Iterable[Document]) -> str:
    """One number for all ids and texts in their order; equal exactly when they are."""
    digest = _Digest()
    for document in documents:
        digest.add(document)
    return digest.hexdigest()


def write_corpus(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    vocab_size: int,
    folder: Path,
    on_tokens: Callable[[int], None],
    *,
    parse_special: bool,
) -> Sources:
    """Tokenize `documents` into `folder`; `on_tokens` hears how many so far. Durable when it returns.

    parse_special: as in `Tokenizer.encode`.

    Raises DatastoreError, naming the document, for a token outside [0, vocab_size): it could not be predicted;
    InvalidRequest for an id or a text that is not text, or an id with a control character.
    """
    digest = _Digest()
    count = entries = 0
    table = folder / DOCUMENTS
    with ArrayStream(folder / TOKENS, "<i4") as tokens, written(table) as lines:
        for document in documents:
            check_id(document.id, f"the id {document.id!r}", param="documents")
            digest.add(document)
            ids = tokenizer.encode(document.text, parse_special=parse_special)  # (t,) int32
            if len(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):
                raise DatastoreError(
                    f"document {document.id!r} has token {ids.max() if ids.min() >= 0 else ids.min()}, "
                    f"expected [0, {vocab_size}): is this the model's tokenizer?"
                )
            row = Row(document.id, tokens.length, len(ids))
            tokens.append(ids)
            with disk_errors(table):
                lines.write(row.line())
            count += 1
            entries += row.entries
            on_tokens(tokens.length)
        tokens.finish()
    sync_folder(folder)
    return Sources(sha256=digest.hexdigest(), documents=count, tokens=tokens.length, entries=entries)


class _Digest:
    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, document: Document) -> None:
        for name, text in (("id", document.id), ("text", document.text)):
            try:
                data = text.encode()
            except UnicodeEncodeError as err:  # half a surrogate pair: JSON can carry it
                raise InvalidRequest(
                    f"the {name} of document {document.id!r} is not text: {err}", param="documents"
                ) from err
            self._sha256.update(len(data).to_bytes(8, "little") + data)  # lengths: ("ab", "c") is not ("a", "bc")

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()
