"""Building a datastore from documents: resumable, atomic, in memory that does not grow with the corpus.

The command that was interrupted, given again, continues. Documents are then read once more, to see that they are the
same (their ids and texts are hashed), but they are neither tokenized nor run through the model again. A version that is
built is published, not activated: which version answers is decided with `Catalog.activate`. Its search is exact until
`knnlm.index.build.build_index` gives it another index.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from knnlm.datastore.arrays import ArrayWriter, open_array
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.corpus import Sources, sources_digest, write_corpus
from knnlm.datastore.document_table import read_rows
from knnlm.datastore.encode import Encoder, plan_parts
from knnlm.datastore.files import write_atomic
from knnlm.datastore.layout import DOCUMENTS, KEYS, MANIFEST, TOKENIZER, TOKENS, VALUES, FileRecord
from knnlm.datastore.manifest import Manifest, ModelRecord
from knnlm.datastore.progress import Clock, Progress, Report, silent
from knnlm.datastore.workspace import Identity, Workspace, workspace
from knnlm.decoding import choose_windows
from knnlm.errors import InvalidRequest, ModelError
from knnlm.messages import Document, ModelInfo
from knnlm.protocols import LanguageModel

BOS_POLICIES = ("document", "window")
KEY_DTYPES = ("float16", "float32")


def build(
    documents: Iterable[Document],
    lm: LanguageModel,
    catalog: Catalog,
    domain: str,
    *,
    version: str | None = None,
    context_length: int | None = None,
    min_context: int | None = None,
    bos: str = "document",
    key_dtype: str = "float16",
    batch_tokens: int = 8192,
    part_entries: int = 16_384,
    on_progress: Report | None = None,
) -> Path:
    """Publish `documents`, as `lm` sees them, as a version of `domain` and return its folder; it is not activated.

    version: None is the next free v<number>, or the one whose building was interrupted. context_length: tokens fed at
    once; min_context: tokens before each target at least; None: see `choose_windows`. bos: see `WindowsRecord`.
    key_dtype: float16 or float32. batch_tokens: tokens fed to the model at once. part_entries: what a kill costs.

    Raises InvalidRequest for a parameter out of range, or when no document has a token to predict (nothing is left
    behind); Conflict when the version exists, is being built by another process, or was begun with other documents or
    settings; DatastoreError when the disk is full, or a key is not finite or too large for key_dtype. After every other
    error the build can be continued.
    """
    check_sizes(batch_tokens=batch_tokens, part_entries=part_entries)
    target = catalog.folder(domain, catalog.next_version(domain) if version is None else version)
    check_tokenizer(lm)
    identity = identity_of(lm.info, context_length, min_context, bos, key_dtype)
    documents = require_documents(documents)
    report = on_progress or silent
    with workspace(target, identity) as space:
        sources = _tokenized(documents, lm, space, report)
        if not sources.entries:
            space.abandon()
            raise _no_token()
        encode(lm, space, sources, batch_tokens=batch_tokens, part_entries=part_entries, report=report)
        report(Progress("publish", sources.entries, sources.entries, 0, 0.0))
        _publish(space, sources, target)
    return target


def _tokenized(documents: Iterable[Document], lm: LanguageModel, space: Workspace, report: Report) -> Sources:
    if space.state.sources is not None:
        space.check_sources(sources_digest(documents))
        return space.state.sources
    sources = tokenize(documents, lm, space.folder, report, parse_special=space.state.identity.windows.parse_special)
    write_atomic(space.folder / TOKENIZER, lm.tokenizer.json.encode())
    space.complete_sources(sources)
    return sources


def _publish(space: Workspace, sources: Sources, target: Path) -> None:
    folder, identity = space.folder, space.state.identity
    names = sorted(f.name for f in folder.iterdir() if not f.name.startswith(".") and f.name != MANIFEST)
    manifest = Manifest(
        domain=target.parent.name,
        version=target.name,
        model=identity.model,
        key_function=identity.key_function,
        windows=identity.windows,
        key_dim=identity.key_dim,
        key_dtype=identity.key_dtype,
        entries=sources.entries,
        documents=sources.documents,
        tokens=sources.tokens,
        files={name: FileRecord.of(folder / name) for name in names},
    )
    manifest.save(folder)
    space.publish(target)


def identity_of(
    info: ModelInfo, context_length: int | None, min_context: int | None, bos: str, key_dtype: str
) -> Identity:
    """What a build by this model is. Raises InvalidRequest for a parameter out of range."""
    length, least = choose_windows(info, context_length=context_length, min_context=min_context)
    if bos not in BOS_POLICIES:
        raise InvalidRequest(f"bos must be document or window, got {bos!r}", param="bos")
    if bos == "window" and (info.bos_token_id is None or length < 3):
        raise InvalidRequest(
            f"bos is window: expected a model with a BOS token and windows of 3 tokens or more, got BOS "
            f"{info.bos_token_id} and {length} tokens",
            param="bos",
        )
    if key_dtype not in KEY_DTYPES:
        raise InvalidRequest(f"key_dtype must be float16 or float32, got {key_dtype!r}", param="key_dtype")
    return Identity.model_validate(
        {
            "model": ModelRecord.of(info),
            "key_function": info.key_function,
            "key_dim": info.key_dim,
            "key_dtype": key_dtype,
            "windows": {"context_length": length, "min_context": least, "parse_special": False, "bos": bos},
        }
    )


def check_sizes(**sizes: int) -> None:
    """Raises InvalidRequest, naming it, for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise InvalidRequest(f"{name} must be >= 1, got {size}", param=name)


def check_tokenizer(lm: LanguageModel) -> None:
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
    raise _no_token()


def _no_token() -> InvalidRequest:
    """The error of a build that would make an empty version: a domain switched to it would find nothing."""
    return InvalidRequest("no document with a token to predict: expected at least one", param="documents")


def tokenize(
    documents: Iterable[Document], lm: LanguageModel, folder: Path, report: Report, *, parse_special: bool
) -> Sources:
    """Documents to tokens.npy and documents.jsonl in `folder`. Raises as `write_corpus` does."""
    clock = Clock()

    def on_tokens(tokens: int) -> None:
        report(Progress("tokenize", 0, 0, tokens, clock.seconds))

    return write_corpus(documents, lm.tokenizer, lm.info.vocab_size, folder, on_tokens, parse_special=parse_special)


def encode(
    lm: LanguageModel, space: Workspace, sources: Sources, *, batch_tokens: int, part_entries: int, report: Report
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
        for part in plan_parts(read_rows(folder / DOCUMENTS), identity.windows, part_entries, lm.info.bos_token_id):
            if encoder.finished(part):
                resumed += part.hi - part.lo
                clock = Clock()  # checking what is there says nothing about the speed of making more
            else:
                encoder.finish(part, on_tokens)
            done = part.hi
            on_tokens(0)
