"""Building a datastore from documents: resumable, atomic, in memory that does not grow with the corpus.

The command that was interrupted, given again, continues. Documents are then read once more, to see that they are the
same (their ids and texts are hashed), but they are neither tokenized nor run through the model again. A version that is
built is published, not activated: which version answers is decided with `Catalog.activate`. Its search is exact until
`knnlm.index.build.build_index` gives it another index.
"""

from collections.abc import Iterable
from pathlib import Path

from knnlm.datastore.catalog import Catalog
from knnlm.datastore.corpus import Sources, sources_digest
from knnlm.datastore.encode import KeyEncoder
from knnlm.datastore.files import write_atomic
from knnlm.datastore.layout import MANIFEST, TOKENIZER
from knnlm.datastore.manifest import Manifest, ModelRecord, WindowsRecord
from knnlm.datastore.phases import check_sizes, check_tokenizer, encode, no_token, require_documents, tokenize
from knnlm.datastore.progress import Progress, Report, silent
from knnlm.datastore.workspace import Identity, Workspace, recorded, workspace
from knnlm.decoding import choose_windows
from knnlm.errors import InvalidRequest
from knnlm.messages import Document

__all__ = ["KeyEncoder", "Progress", "build"]

KEY_DTYPES = ("float16", "float32")


def build(
    documents: Iterable[Document],
    lm: KeyEncoder,
    catalog: Catalog,
    domain: str,
    *,
    version: str | None = None,
    context_length: int | None = None,
    min_context: int | None = None,
    key_dtype: str = "float16",
    batch_tokens: int = 8192,
    part_entries: int = 16_384,
    on_progress: Report | None = None,
) -> Path:
    """Publish `documents`, as `lm` sees them, as a version of `domain` and return its folder; it is not activated.

    version: None is the next free v<number>, or the one whose building was interrupted. context_length: tokens fed at
    once; min_context: tokens before each target at least; None: see `choose_windows`. key_dtype:
    float16 or float32. batch_tokens: how many tokens the model is given at once. part_entries: what a kill costs.

    Raises InvalidRequest for a parameter out of range, or when no document has a token to predict (nothing is left
    behind); Conflict when the version exists, is being built by another process, or was begun with other documents or
    settings; DatastoreError when the disk is full, or a key is not finite or too large for key_dtype. After every other
    error the build can be continued.
    """
    check_sizes(batch_tokens=batch_tokens, part_entries=part_entries)
    target = catalog.folder(domain, catalog.next_version(domain) if version is None else version)
    identity = _identity(lm, context_length, min_context, key_dtype)
    documents = require_documents(documents)
    report = on_progress or silent
    with workspace(target, identity) as space:
        sources = _tokenized(documents, lm, space, report)
        if not sources.entries:
            space.abandon()
            raise no_token()
        encode(lm, space, sources, batch_tokens=batch_tokens, part_entries=part_entries, report=report)
        report(Progress("publish", sources.entries, sources.entries, 0, 0.0))
        _publish(space, sources, target)
    return target


def _tokenized(documents: Iterable[Document], lm: KeyEncoder, space: Workspace, report: Report) -> Sources:
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
        files={name: recorded(folder / name) for name in names},
    )
    manifest.save(folder)
    space.publish(target)


def _identity(lm: KeyEncoder, context_length: int | None, min_context: int | None, key_dtype: str) -> Identity:
    check_tokenizer(lm)
    info = lm.info
    length, least = choose_windows(info, context_length=context_length, min_context=min_context)
    if key_dtype not in KEY_DTYPES:
        raise InvalidRequest(f"key_dtype must be float16 or float32, got {key_dtype!r}", param="key_dtype")
    return Identity.model_validate(
        {
            "model": ModelRecord.of(info),
            "key_function": info.key_function,
            "key_dim": info.key_dim,
            "key_dtype": key_dtype,
            "windows": WindowsRecord(context_length=length, min_context=least, parse_special=False),
        }
    )
