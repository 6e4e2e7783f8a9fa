"""Every byte of a version against its manifest, and its files against one another, in one streamed reading."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from knnlm.datastore.document_table import read_rows
from knnlm.datastore.files import sha256_of
from knnlm.datastore.layout import MANIFEST, REMOVED, TOKENIZER, segment_files
from knnlm.datastore.manifest import Manifest, ShardRecord
from knnlm.datastore.reader import Datastore, Segment, load_shard, open_segments
from knnlm.errors import DatastoreError

SLICE_NUMBERS = 1 << 20  # read at a time: values, or numbers of keys


@dataclass(frozen=True)
class Check:
    """One file, or one relation between files. problem: None when all is well, else what is wrong. remark: what is
    sound, but may not be meant."""

    name: str
    problem: str | None
    remark: str | None = None


def verify(path: Path) -> Iterator[Check]:
    """Check the version in folder `path`, one result as soon as it is known; no exception for what is found damaged.

    First the manifest, then the checksum of every file, files that are not listed, and, when all of them are sound,
    what they say about one another, segment by segment: the values are the tokens they stand for, the documents cover
    the tokens, keys are finite, the counts agree; and that removed documents exist. Without a valid manifest nothing
    else can be checked. Of a version of shards: all of this for every shard, and that it is the one that was
    published; a remark where another one has the same content. Indexes are opened by knnlm.index.verify.
    """
    try:
        manifest = Manifest.load(path)
    except DatastoreError as err:
        yield Check(MANIFEST, err.message)
        return
    yield Check(MANIFEST, None)
    sound = True
    for name, record in sorted(manifest.files.items()):
        problem = record.problem(path / name)
        sound = sound and problem is None
        yield Check(name, problem)
    for shard in manifest.shards:
        check = _checked(f"{shard.name}: is what was published", partial(_shard_problem, path, manifest, shard))
        yield replace(check, remark=_shard_remark(manifest, shard))
        for check in verify(path / shard.name):
            yield Check(f"{shard.name}/{check.name}", check.problem)
    listed = {MANIFEST, *manifest.files, *(shard.name for shard in manifest.shards)}
    for file in sorted(path.iterdir()):
        if file.name not in listed and not file.name.startswith("."):
            yield Check(file.name, "is not listed in the manifest")
    if sound and not manifest.shards:
        yield from _relations(path)


def _relations(path: Path) -> Iterator[Check]:
    try:
        datastore = Datastore.open(path)
    except DatastoreError as err:
        yield Check("opening", err.message)
        return
    if datastore.manifest.removed is not None:
        yield Check(f"{REMOVED}: names documents", None)  # or it would not have been opened
    first = tokens = 0  # where the part begins
    for part in open_segments(path, datastore.manifest):
        names = segment_files(part.number)
        yield _checked(f"{names.documents}: covers the tokens", partial(_documents_problem, datastore, part))
        yield _checked(
            f"{names.values}: are the tokens they stand for", partial(_values_problem, datastore, part, first, tokens)
        )
        yield _checked(f"{names.keys}: are finite", partial(_keys_problem, part, first))
        first, tokens = first + len(part.values), tokens + len(part.tokens)
    yield _checked(f"{TOKENIZER}: is the model's", partial(_tokenizer_problem, datastore))


def _shard_problem(path: Path, manifest: Manifest, shard: ShardRecord) -> None:
    load_shard(path, manifest, shard)


def _shard_remark(manifest: Manifest, shard: ShardRecord) -> str | None:
    """No damage: documents may be given twice, and cut where they begin again."""
    first = next(other for other in manifest.shards if other.content == shard.content)
    return None if first is shard else f"the version says that it holds the same documents and keys as {first.name}"


def _checked(name: str, check: Callable[[], str | None]) -> Check:
    try:
        return Check(name, check())
    except DatastoreError as err:
        return Check(name, err.message)


def _documents_problem(datastore: Datastore, part: Segment) -> str | None:
    documents = tokens = entries = 0
    for row in read_rows(datastore.path / segment_files(part.number).documents):
        documents += 1
        tokens += row.tokens
        entries += row.entries
    manifest = datastore.manifest
    counted = {segment.number: segment.documents for segment in manifest.segments}
    found = (documents, tokens, entries)
    expected = (counted.get(part.number, manifest.base_documents), len(part.tokens), len(part.values))
    return None if found == expected else f"(documents, tokens, entries) are {found}, expected {expected}"


def _values_problem(datastore: Datastore, part: Segment, first: int, first_token: int) -> str | None:
    """first, first_token: the numbers of its first entry and of its first token."""
    table, vocab_size = datastore.documents, datastore.manifest.model.vocab_size
    for lo in range(0, len(part.values), SLICE_NUMBERS):
        values = part.values[lo : lo + SLICE_NUMBERS]
        documents, positions = table.locate(np.arange(first + lo, first + lo + len(values)))
        expected = part.tokens[table.starts[documents] - first_token + positions]
        wrong = np.flatnonzero(values != expected)
        if len(wrong):
            at = int(wrong[0])
            return f"entry {first + lo + at} has value {values[at]}, its token is {expected[at]}"
        if not (values.min() >= 0 and values.max() < vocab_size):
            return f"values lie in [{values.min()}, {values.max()}], expected [0, {vocab_size})"
    return None


def _keys_problem(part: Segment, first: int) -> str | None:
    """first: the number of its first entry."""
    step = max(1, SLICE_NUMBERS // part.keys.shape[1])
    for lo in range(0, len(part.keys), step):
        finite = np.isfinite(part.keys[lo : lo + step]).all(axis=1)
        if not finite.all():
            return f"the key of entry {first + lo + int(np.argmin(finite))} is not finite"
    return None


def _tokenizer_problem(datastore: Datastore) -> str | None:
    sha256, expected = sha256_of(datastore.path / TOKENIZER), datastore.manifest.model.tokenizer_sha256
    return None if sha256 == expected else f"has sha256 {sha256}, the model's has {expected}"
