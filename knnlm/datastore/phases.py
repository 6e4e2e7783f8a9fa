"""What documents go through before they are part of a version, whether it is built of them or they are added to one.

Both phases work in a folder of their own, report how far they are, and leave it to workspace.py to remember it.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from knnlm.datastore.arrays import ArrayWriter, open_array
from knnlm.datastore.corpus import Sources, write_corpus
from knnlm.datastore.documents import read_rows
from knnlm.datastore.encode import Encoder, KeyEncoder, plan_parts
from knnlm.datastore.layout import DOCUMENTS, KEYS, TOKENS, VALUES
from knnlm.datastore.progress import Clock, Progress, Report
from knnlm.datastore.workspace import Workspace
from knnlm.errors import InvalidRequest, ModelError
from knnlm.messages import Document

__all__ = ["check_sizes", "check_tokenizer", "encode", "no_token", "require_documents", "tokenize"]


def check_sizes(**sizes: int) -> None:
    """Raises InvalidRequest, naming it, for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise InvalidRequest(f"{name} must be >= 1, got {size}", param=name)


def check_tokenizer(lm: KeyEncoder) -> None:
    """Raises ModelError when the tokenizer is not the one that the model says it has."""
    if lm.tokenizer.sha256 != lm.info.tokenizer_sha256:
        raise ModelError(
            f"the tokenizer of model {lm.info.model_id} has sha256 {lm.tokenizer.sha256}, "
            f"it says {lm.info.tokenizer_sha256}"
        )


def require_documents(documents: Iterable[Document]) -> Iterator[Document]:
    """The same documents, of which the first has been read. Raises InvalidRequest when there is none."""
    rest = iter(documents)
    for first in rest:
        return chain((first,), rest)
    raise no_token()


def no_token() -> InvalidRequest:
    """The error of a build that would make an empty version: a domain switched to it would find nothing."""
    return InvalidRequest("no document with a token to predict: expected at least one", param="documents")


def tokenize(
    documents: Iterable[Document], lm: KeyEncoder, folder: Path, report: Report, *, parse_special: bool
) -> Sources:
    """Documents to tokens.npy and documents.jsonl in `folder`. Raises as `write_corpus` does."""
    clock = Clock()

    def on_tokens(tokens: int) -> None:
        report(Progress("tokenize", 0, 0, tokens, clock.seconds))

    return write_corpus(documents, lm.tokenizer, lm.info.vocab_size, folder, on_tokens, parse_special=parse_special)


def encode(
    lm: KeyEncoder, space: Workspace, sources: Sources, *, batch_tokens: int, part_entries: int, report: Report
) -> None:
    """The tokens of a workspace to its keys.npy and values.npy, part by part; what an earlier run finished stays."""
    folder, identity = space.folder, space.state.identity
    shape = (sources.entries, identity.key_dim)
    key_dtype = np.dtype(identity.key_dtype).newbyteorder("<")
    clock = Clock()
    done = resumed = tokens = 0

    def on_tokens(count: int) -> None:
        nonlocal tokens
        tokens += count
        report(Progress("encode", done, sources.entries, tokens, clock.seconds, resumed))

    with (
        ArrayWriter(folder / KEYS, shape, key_dtype) as keys,
        ArrayWriter(folder / VALUES, shape[:1], "<i4") as values,
    ):
        encoder = Encoder(
            lm,
            open_array(folder / TOKENS, (sources.tokens,), "<i4"),
            keys,
            values,
            key_dtype=identity.key_dtype,
            batch_tokens=batch_tokens,
            records=space.records,
        )
        for part in plan_parts(read_rows(folder / DOCUMENTS), identity.windows, part_entries):
            if encoder.finished(part):
                resumed += part.hi - part.lo
                clock = Clock()  # checking what is there says nothing about the speed of making more
            else:
                encoder.finish(part, on_tokens)
            done = part.hi
            on_tokens(0)
