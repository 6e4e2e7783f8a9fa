"""Every byte of a version against its manifest, and its files against one another, in one streamed reading."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from knnlm.datastore.documents import read_rows
from knnlm.datastore.files import sha256_of
from knnlm.datastore.layout import DOCUMENTS, KEYS, MANIFEST, TOKENIZER, VALUES
from knnlm.datastore.manifest import FileRecord, Manifest
from knnlm.datastore.reader import Datastore
from knnlm.errors import DatastoreError

__all__ = ["Check", "verify"]

CHUNK = 1 << 20  # entries, or rows of keys worth about as many numbers


@dataclass(frozen=True)
class Check:
    """One file, or one relation between files. problem: None when all is well, else what is wrong."""

    name: str
    problem: str | None


def verify(path: Path) -> Iterator[Check]:
    """Check the version in folder `path`, one result as soon as it is known; no exception for what is found damaged.

    First the manifest, then the checksum of every file, files that are not listed, and, when all of them are sound,
    what they say about one another: the values are the tokens they stand for, the documents cover the tokens, keys are
    finite, the counts agree. Without a valid manifest nothing else can be checked.
    """
    try:
        manifest = Manifest.load(path)
    except DatastoreError as err:
        yield Check(MANIFEST, err.message)
        return
    yield Check(MANIFEST, None)
    sound = True
    for name, record in sorted(manifest.files.items()):
        problem = _file_problem(path / name, record)
        sound = sound and problem is None
        yield Check(name, problem)
    listed = {MANIFEST, *manifest.files}
    for file in sorted(path.iterdir()):
        if file.name not in listed and not file.name.startswith("."):
            yield Check(file.name, "is not listed in the manifest")
    if sound:
        yield from _relations(path)


def _file_problem(file: Path, record: FileRecord) -> str | None:
    try:
        size = file.stat().st_size
        if size != record.bytes:
            return f"has {size} bytes, expected {record.bytes}"
        sha256 = sha256_of(file)
    except OSError as err:
        return f"cannot be read: {err.strerror}"
    return None if sha256 == record.sha256 else f"has sha256 {sha256}, expected {record.sha256}"


def _relations(path: Path) -> Iterator[Check]:
    checks: tuple[tuple[str, Callable[[Datastore], str | None]], ...] = (
        (f"{DOCUMENTS}: covers the tokens", _documents_problem),
        (f"{VALUES}: are the tokens they stand for", _values_problem),
        (f"{KEYS}: are finite", _keys_problem),
        (f"{TOKENIZER}: is the model's", _tokenizer_problem),
    )
    try:
        datastore = Datastore.open(path)
    except DatastoreError as err:
        yield Check("opening", err.message)
        return
    for name, check in checks:
        try:
            yield Check(name, check(datastore))
        except DatastoreError as err:
            yield Check(name, err.message)


def _documents_problem(datastore: Datastore) -> str | None:
    documents = tokens = entries = 0
    for row in read_rows(datastore.path / DOCUMENTS):
        documents += 1
        tokens += row.tokens
        entries += row.entries
    manifest = datastore.manifest
    found, expected = (documents, tokens, entries), (manifest.documents, manifest.tokens, manifest.entries)
    if found == expected:
        return None
    return f"(documents, tokens, entries) are {found}, expected {expected}"


def _values_problem(datastore: Datastore) -> str | None:
    for lo in range(0, datastore.manifest.entries, CHUNK):
        entries = np.arange(lo, min(lo + CHUNK, datastore.manifest.entries))
        documents, positions = datastore.document_of(entries)
        values = datastore.values[entries]
        expected = datastore.tokens[datastore.documents.starts[documents] + positions]
        wrong = np.flatnonzero(values != expected)
        if len(wrong):
            at = int(wrong[0])
            return f"entry {lo + at} has value {values[at]}, its token is {expected[at]}"
        if len(values) and not (values.min() >= 0 and values.max() < datastore.manifest.model.vocab_size):
            return (
                f"values lie in [{values.min()}, {values.max()}], expected [0, {datastore.manifest.model.vocab_size})"
            )
    return None


def _keys_problem(datastore: Datastore) -> str | None:
    step = max(1, CHUNK // datastore.manifest.key_dim)
    for lo in range(0, datastore.manifest.entries, step):
        finite = np.isfinite(datastore.keys[lo : lo + step]).all(axis=1)
        if not finite.all():
            return f"the key of entry {lo + int(np.argmin(finite))} is not finite"
    return None


def _tokenizer_problem(datastore: Datastore) -> str | None:
    sha256, expected = sha256_of(datastore.path / TOKENIZER), datastore.manifest.model.tokenizer_sha256
    return None if sha256 == expected else f"has sha256 {sha256}, the model's has {expected}"
