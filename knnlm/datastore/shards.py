"""Cutting a corpus into shards: consecutive whole documents, each shard a version by itself in a folder of its own.

Entries keep their order: entry i of a shard is entry first + i of the version. How shards are searched together:
knnlm/index/sharding.py.
"""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from knnlm.datastore.arrays import ArrayStream, ArrayWriter
from knnlm.datastore.document_table import Row
from knnlm.datastore.files import disk_errors, sync_folder, write_atomic, written
from knnlm.datastore.layout import DOCUMENTS, KEYS, TOKENIZER, TOKENS, VALUES, FileRecord
from knnlm.datastore.manifest import SHARDED_VERSION, IndexRecord, Manifest, ShardRecord
from knnlm.errors import InvalidRequest

Keys = npt.NDArray[np.floating]
MAX_SHARDS = 10_000  # each a manifest to read on opening


@dataclass(frozen=True)
class ShardPlan:
    """Documents [documents[0], documents[1]) of a corpus, and likewise their entries and tokens."""

    number: int
    documents: tuple[int, int]
    entries: tuple[int, int]
    tokens: tuple[int, int]

    @property
    def counts(self) -> dict[str, int]:
        return {name: getattr(self, name)[1] - getattr(self, name)[0] for name in ("documents", "entries", "tokens")}


def plan_shards(rows: Iterable[Row], shards: int, entries: int) -> list[ShardPlan]:
    """Cut documents that have `entries` entries together into shards of about the same number of them.

    Raises InvalidRequest for a number of shards that is out of range, or for which a shard would be empty because
    documents are not cut.
    """
    if not 1 <= shards <= MAX_SHARDS:
        raise InvalidRequest(f"shards must lie in [1, {MAX_SHARDS}], got {shards}", param="shards")
    plans: list[ShardPlan] = []
    begin = at = (0, 0, 0)  # documents, entries, tokens
    for row in rows:
        after = (at[0] + 1, at[1] + row.entries, at[2] + row.tokens)
        for end in (at, after):  # whichever is nearer to where the shard should end; the last takes what is left
            wanted = entries * (len(plans) + 1) / shards
            near = end[1] >= wanted or (end is at and after[1] > wanted and wanted - at[1] < after[1] - wanted)
            if len(plans) + 1 < shards and end[1] > begin[1] and near:
                plans.append(_plan(len(plans), begin, end))
                begin = end
        at = after
    if at[1] > begin[1]:
        plans.append(_plan(len(plans), begin, at))
    if len(plans) < shards:
        raise InvalidRequest(
            f"{shards} shards were asked for, but documents are not cut and there is enough for {len(plans)}",
            param="shards",
        )
    return plans


def _plan(number: int, begin: tuple[int, int, int], end: tuple[int, int, int]) -> ShardPlan:
    documents, entries, tokens = zip(begin, end, strict=True)
    return ShardPlan(number, documents, entries, tokens)


def write_shard(
    folder: Path,
    plan: ShardPlan,
    rows: Iterable[tuple[Row, npt.NDArray[np.int32]]],
    keys: Iterable[Keys],
    tokenizer: str,
    fields: dict[str, Any],
) -> Manifest:
    """Write a shard into `folder`, whatever was there, and return its manifest; its search is exact.

    rows: its documents with their tokens, in order. keys: (m, d) blocks, all of its entries in order. tokenizer: its
    JSON. fields: those of the manifest that all shards have in common. Raises DatastoreError when the disk is full.
    """
    with disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    table = folder / DOCUMENTS
    with (
        ArrayStream(folder / TOKENS, "<i4") as tokens,
        ArrayStream(folder / VALUES, "<i4") as values,
        written(table) as lines,
    ):
        for row, text in rows:
            line = Row(row.id, tokens.length, row.tokens).line()
            tokens.append(text)
            values.append(text[1:])
            with disk_errors(table):
                lines.write(line)
        tokens.finish()
        values.finish()
    shape = (plan.counts["entries"], int(fields["key_dim"]))
    done = 0
    with ArrayWriter(folder / KEYS, shape, np.dtype(fields["key_dtype"]).newbyteorder("<")) as writer:
        for block in keys:
            writer.write(done, block)
            done += len(block)
    write_atomic(folder / TOKENIZER, tokenizer.encode())
    names = (KEYS, VALUES, TOKENS, DOCUMENTS, TOKENIZER)
    files = {name: FileRecord.of(folder / name) for name in names}
    manifest = Manifest(**fields, **plan.counts, files=files)
    manifest.save(folder)
    sync_folder(folder.parent)
    return manifest


def sharded_manifest(shards: Sequence[Manifest], index: IndexRecord, files: dict[str, FileRecord]) -> Manifest:
    """The manifest of the version that these shards are. index: as all of them have it. files: what they share."""
    records = tuple(ShardRecord.of(number, shard) for number, shard in enumerate(shards))
    update = {
        "format_version": SHARDED_VERSION,
        "created": datetime.now(UTC),
        "shards": records,
        "index": index,
        "other_indexes": (),
        "files": files,
        **{name: sum(getattr(r, name) for r in records) for name in ("entries", "documents", "tokens")},
    }
    return shards[0].model_copy(update=update)


def shard_folders(path: Path, manifest: Manifest) -> Iterator[Path]:
    """The folders of the shards of the version in folder `path`."""
    for shard in manifest.shards:
        yield path / shard.name
