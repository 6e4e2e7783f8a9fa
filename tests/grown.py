"""Versions that have grown, written by hand: what reads them is tested without what makes them."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.files import sha256_of
from knnlm.datastore.layout import FileRecord
from knnlm.datastore.manifest import Manifest, RemovedRecord, SegmentRecord
from knnlm.messages import Document
from knnlm.testing import ToyLanguageModel

LETTERS = "abcdefgh "


def some_documents(prefix: str, lengths: Sequence[int], seed: int) -> list[Document]:
    """Texts of random letters, so many each; few letters, so that contexts come again."""
    rng = np.random.default_rng(seed)
    return [Document(f"{prefix}{i}", "".join(rng.choice(list(LETTERS), n))) for i, n in enumerate(lengths)]


def base(store: Path, documents: Sequence[Document], lm: ToyLanguageModel, *, key_dtype: str = "float16") -> Path:
    """Domain "toy", version "v1", current."""
    path = build(documents, lm, Catalog(store), "toy", version="v1", key_dtype=key_dtype)
    Catalog(store).activate("toy", "v1")
    return path


def grow(
    parent: Path,
    lm: ToyLanguageModel,
    segments: Sequence[Sequence[Document]] = (),
    removed: Sequence[int] = (),
    *,
    version: str = "v2",
    numbers: Sequence[int] | None = None,
) -> Path:
    """The version beside `parent`, of format 1, to which these were added, and without the documents of these numbers.

    numbers: of the segments; by default 1, 2, ...
    """
    old = Manifest.load(parent)
    path = parent.with_name(version)
    path.mkdir()
    for name in old.files:
        os.link(parent / name, path / name)
    records = []
    lengths = document_entries(parent)
    for number, documents in zip(numbers or range(1, len(segments) + 1), segments, strict=True):
        catalog = Catalog(parent.parent.parent / "parts")
        whole = lm.info.context_length
        part = build(documents, lm, catalog, f"{version}-{number}", context_length=whole, key_dtype=old.key_dtype)
        for stem, suffix in (("keys", "npy"), ("values", "npy"), ("tokens", "npy"), ("documents", "jsonl")):
            shutil.copyfile(part / f"{stem}.{suffix}", path / f"{stem}.{number}.{suffix}")
        made = Manifest.load(part)
        records.append(SegmentRecord(number=number, entries=made.entries, documents=made.documents, tokens=made.tokens))
        lengths += document_entries(part)
    gone = None
    if removed:
        np.save(path / "removed.npy", np.array(sorted(removed), "<i8"))
        gone = RemovedRecord(documents=len(removed), entries=sum(lengths[number] for number in removed))
    files = {
        file.name: FileRecord(bytes=file.stat().st_size, sha256=sha256_of(file)) for file in sorted(path.iterdir())
    }
    manifest = Manifest.model_validate(
        {
            **old.model_dump(),
            "format_version": 2 if records or gone else 1,
            "version": version,
            "entries": old.entries + sum(record.entries for record in records),
            "documents": old.documents + sum(record.documents for record in records),
            "tokens": old.tokens + sum(record.tokens for record in records),
            "files": files,
            "segments": records,
            "removed": gone,
            "parent": parent.name,
        }
    )
    manifest.save(path)
    return path


def emptied(path: Path) -> Path:
    """Make the version in folder `path` one of no documents, as compacting one whose documents were removed does."""
    for name in ("keys.npy", "values.npy", "tokens.npy"):
        np.save(path / name, np.load(path / name)[:0])
    (path / "documents.jsonl").write_bytes(b"")
    resealed(path, "keys.npy", "values.npy", "tokens.npy", "documents.jsonl", entries=0, documents=0, tokens=0)
    return path


def document_entries(path: Path) -> list[int]:
    """Of every document of a version of format 1, or of one of its segments."""
    rows = [json.loads(line) for line in (path / "documents.jsonl").read_text().splitlines()]
    return [max(row["tokens"] - 1, 0) for row in rows]


def resealed(path: Path, *names: str, **fields: object) -> None:
    """Write the manifest that a program would have written which made these files, or fields, wrong."""
    records = {n: FileRecord(bytes=(path / n).stat().st_size, sha256=sha256_of(path / n)) for n in names}
    manifest = Manifest.load(path)
    manifest.model_copy(update={"files": {**manifest.files, **records}, **fields}).save(path)
