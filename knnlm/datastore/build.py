"""Building a datastore from documents: resumable, atomic, in memory that does not grow with the corpus.

The command that was interrupted, given again, continues. Documents are then read once more, to see that they are the
same (their ids and texts are hashed), but they are neither tokenized nor run through the model again. A version that is
built is published, not activated: which version answers is decided with `Catalog.activate`. Its search is exact until
`knnlm.index.build.build_index` gives it another index.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from knnlm.datastore.arrays import ArrayWriter, open_array
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.corpus import Sources, sources_digest, write_corpus
from knnlm.datastore.documents import read_rows
from knnlm.datastore.encode import Encoder, KeyEncoder, plan_parts
from knnlm.datastore.files import sha256_of, write_atomic
from knnlm.datastore.layout import DOCUMENTS, KEYS, MANIFEST, TOKENIZER, TOKENS, VALUES
from knnlm.datastore.manifest import FileRecord, Manifest, ModelRecord, WindowsRecord
from knnlm.datastore.progress import Progress
from knnlm.datastore.text import Document
from knnlm.datastore.workspace import Identity, Workspace, workspace
from knnlm.errors import InvalidRequest, ModelError

__all__ = ["KeyEncoder", "Progress", "build"]

KEY_DTYPES = ("float16", "float32")

Report = Callable[[Progress], None]


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
    once, None = all the model can; min_context: tokens before each target at least, None = half of that. key_dtype:
    float16 or float32. batch_tokens: how many tokens the model is given at once. part_entries: what a kill costs.

    Raises InvalidRequest for a parameter out of range; Conflict when the version exists, is being built by another
    process, or was begun with other documents or settings; DatastoreError when the disk is full, or a key is not
    finite or too large for key_dtype. After every error the build can be continued.
    """
    for name, number in (("batch_tokens", batch_tokens), ("part_entries", part_entries)):
        if number < 1:
            raise InvalidRequest(f"{name} must be >= 1, got {number}", param=name)
    target = catalog.folder(domain, catalog.next_version(domain) if version is None else version)
    with workspace(target, _identity(lm, context_length, min_context, key_dtype)) as space:
        run = _Run(space, lm, on_progress or _silent)
        sources = run.tokenize(documents)
        run.encode(sources, batch_tokens, part_entries)
        run.publish(sources, target)
    return target


class _Run:
    def __init__(self, space: Workspace, lm: KeyEncoder, report: Report) -> None:
        self._space = space
        self._identity = space.state.identity
        self._lm = lm
        self._report = report

    def tokenize(self, documents: Iterable[Document]) -> Sources:
        if self._space.state.sources is not None:
            self._space.check_sources(sources_digest(documents))
            return self._space.state.sources
        clock = _Clock()

        def on_tokens(tokens: int) -> None:
            self._report(Progress("tokenize", 0, 0, tokens, clock.seconds))

        sources = write_corpus(documents, self._lm.tokenizer, self._lm.info.vocab_size, self._space.folder, on_tokens)
        write_atomic(self._space.folder / TOKENIZER, self._lm.tokenizer.json.encode())
        self._space.complete_sources(sources)
        return sources

    def encode(self, sources: Sources, batch_tokens: int, part_entries: int) -> None:
        folder, shape = self._space.folder, (sources.entries, self._identity.key_dim)
        key_dtype = np.dtype(self._identity.key_dtype).newbyteorder("<")
        clock = _Clock()
        done = resumed = tokens = 0

        def on_tokens(count: int) -> None:
            nonlocal tokens
            tokens += count
            self._report(Progress("encode", done, sources.entries, tokens, clock.seconds, resumed))

        with (
            ArrayWriter(folder / KEYS, shape, key_dtype) as keys,
            ArrayWriter(folder / VALUES, shape[:1], "<i4") as values,
        ):
            encoder = Encoder(
                self._lm,
                open_array(folder / TOKENS, (sources.tokens,), "<i4"),
                keys,
                values,
                key_dtype=self._identity.key_dtype,
                batch_tokens=batch_tokens,
                records=self._space.records,
            )
            for part in plan_parts(read_rows(folder / DOCUMENTS), self._identity.windows, part_entries):
                if encoder.finished(part):
                    resumed += part.hi - part.lo
                    clock = _Clock()  # checking what is there says nothing about the speed of making more
                else:
                    encoder.finish(part, on_tokens)
                done = part.hi
                on_tokens(0)

    def publish(self, sources: Sources, target: Path) -> None:
        self._report(Progress("publish", sources.entries, sources.entries, 0, 0.0))
        folder = self._space.folder
        names = sorted(f.name for f in folder.iterdir() if not f.name.startswith(".") and f.name != MANIFEST)
        manifest = Manifest(
            domain=target.parent.name,
            version=target.name,
            model=self._identity.model,
            key_function=self._identity.key_function,
            windows=self._identity.windows,
            key_dim=self._identity.key_dim,
            key_dtype=self._identity.key_dtype,
            entries=sources.entries,
            documents=sources.documents,
            tokens=sources.tokens,
            files={n: FileRecord(bytes=(folder / n).stat().st_size, sha256=sha256_of(folder / n)) for n in names},
        )
        manifest.save(folder)
        self._space.publish(target)


def _silent(progress: Progress) -> None:
    del progress


class _Clock:
    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start


def _identity(lm: KeyEncoder, context_length: int | None, min_context: int | None, key_dtype: str) -> Identity:
    info = lm.info
    if lm.tokenizer.sha256 != info.tokenizer_sha256:
        raise ModelError(
            f"the tokenizer of model {info.model_id} has sha256 {lm.tokenizer.sha256}, it says {info.tokenizer_sha256}"
        )
    length = info.context_length if context_length is None else context_length
    if not 2 <= length <= info.context_length:
        raise InvalidRequest(
            f"context_length must lie in [2, {info.context_length}], got {length}", param="context_length"
        )
    least = length // 2 if min_context is None else min_context
    if not 1 <= least < length:
        raise InvalidRequest(f"min_context must lie in [1, {length}), got {least}", param="min_context")
    if key_dtype not in KEY_DTYPES:
        raise InvalidRequest(f"key_dtype must be float16 or float32, got {key_dtype!r}", param="key_dtype")
    return Identity.model_validate(
        {
            "model": ModelRecord.of(info),
            "key_function": info.key_function,
            "key_dim": info.key_dim,
            "key_dtype": key_dtype,
            "windows": WindowsRecord(context_length=length, min_context=least),
        }
    )
