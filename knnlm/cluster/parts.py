"""The work of a build in pieces that any worker may do, or do again: files in the folder of the build.

    .build/units/00012/     some files of documents, tokenized: tokens.npy, documents.jsonl, unit.json
    .build/parts/00034.*    keys and values of consecutive entries, here or as objects elsewhere, and what says that
                            they are complete
    shard-00001/            a shard, complete when it has a manifest

Parts are those of `knnlm build`: the same windows together in the same batches, whatever files and shards they come
from and go to, so that keys are bit-equal. Whatever appears under its name is whole, and was renamed to it.
"""

import hashlib
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from knnlm.cluster.objects import below
from knnlm.cluster.part_rows import FileRows, ObjectRows, PartRows
from knnlm.cluster.sources import SourceFile, read_files
from knnlm.datastore.arrays import open_array
from knnlm.datastore.corpus import Sources, write_corpus
from knnlm.datastore.document_table import Row, rows_with_offsets
from knnlm.datastore.encode import Encoder, Part, PartRecord, Piece, plan_parts, record_path
from knnlm.datastore.files import discard, disk_errors, sync_folder, write_atomic
from knnlm.datastore.layout import BUILD_FOLDER, DOCUMENTS, MANIFEST, TOKENS, Record, shard_name
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.shards import ShardPlan, write_shard
from knnlm.datastore.workspace import Identity
from knnlm.decoding import plan_fed_windows
from knnlm.errors import Conflict, DatastoreCorrupt, DatastoreError
from knnlm.evaluation.splits import Part as CorpusPart
from knnlm.evaluation.splits import select
from knnlm.protocols import LanguageModel
from knnlm.tokenizer import Tokenizer

UNITS, PARTS = Path(BUILD_FOLDER, "units"), Path(BUILD_FOLDER, "parts")


class UnitRecord(Record):
    """unit.json. files: as `SourceFile`. part: which documents of them."""

    files: tuple[SourceFile, ...]
    part: CorpusPart
    sources: Sources


@dataclass(frozen=True)
class Job:
    """What every worker knows of a build. units: the tokens of each, in order. parts_at: the URL of the folder that
    parts lie in, None = with the build; their records always do."""

    folder: Path
    identity: Identity
    units: tuple[int, ...] = ()
    batch_tokens: int = 8192
    parts_at: str | None = None

    @property
    def bos_token_id(self) -> int | None:
        return self.identity.model.bos_token_id


@dataclass(frozen=True)
class Place:
    """The line of a document: at `offset`, in bytes, of a unit's table of documents."""

    unit: int = 0
    offset: int = 0


@dataclass(frozen=True)
class PlacedRow(Row):
    """A document whose `start` counts through all units."""

    place: Place = Place()


@dataclass(frozen=True)
class PartPlan:
    """Entries [lo, hi): those from the window on that predicts token `first` of the document at `place`."""

    number: int
    lo: int
    hi: int
    place: Place
    first: int


@dataclass(frozen=True)
class Done:
    """What became of a piece of work. tokens: fed to the model by this call. entries: of the piece. resumed: whether an
    earlier run had made it. node: where it was made, empty for shards."""

    node: str
    tokens: int = 0
    entries: int = 0
    resumed: bool = False


def unit_folder(folder: Path, number: int) -> Path:
    return folder / UNITS / f"{number:05d}"


def tokenize_unit(
    folder: Path, number: int, files: tuple[SourceFile, ...], part: CorpusPart, tokenizer: Tokenizer, vocab_size: int,
    parse_special: bool,
) -> Sources:  # fmt: skip
    """Tokenize the documents of some files, unless that was done. Files that were touched since are read again, to see
    whether they are the same. Raises Conflict when the unit was begun with other documents, and as `write_corpus` and
    reading documents do."""
    target = unit_folder(folder, number)
    record = _unit_record(target)
    if record is not None:
        if (record.files, record.part) == (files, part):
            return record.sources
        if record.part != part or _unstamped(record.files) != _unstamped(files):
            raise _other_documents(folder, files)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    with disk_errors(draft):
        draft.mkdir(parents=True)
    documents = select(read_files(files), part)
    sources = write_corpus(documents, tokenizer, vocab_size, draft, _ignore, parse_special=parse_special)
    made = UnitRecord(files=files, part=part, sources=sources).model_dump_json().encode()
    if record is not None:
        discard(draft)
        if sources != record.sources:
            raise _other_documents(folder, files)
        write_atomic(target / "unit.json", made)
        return sources
    write_atomic(draft / "unit.json", made)
    _rename(draft, target)
    return sources


def _other_documents(folder: Path, files: Sequence[SourceFile]) -> Conflict:
    return Conflict(
        f"{folder} was begun with other documents, or they have changed since: at {files[0].where}; "
        "continue it with those it was begun with, or remove the folder",
        param="sources",
    )


def _unstamped(files: Sequence[SourceFile]) -> list[tuple[str, str, int]]:
    return [(file.where, file.name, file.size) for file in files]


def _ignore(tokens: int) -> None:
    del tokens


def _unit_record(folder: Path) -> UnitRecord | None:
    try:
        return UnitRecord.model_validate_json((folder / "unit.json").read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as err:
        raise DatastoreCorrupt(f"{folder} is damaged; remove it to tokenize its files again: {err}") from err


def placed_rows(job: Job, begin: Place = Place()) -> Iterator[PlacedRow]:
    """The documents of all units in order, from the one at `begin` on."""
    first = sum(job.units[: begin.unit])
    for unit in range(begin.unit, len(job.units)):
        offset = begin.offset if unit == begin.unit else 0
        for row, at in rows_with_offsets(unit_folder(job.folder, unit) / DOCUMENTS, offset):
            yield PlacedRow(row.id, first + row.start, row.tokens, Place(unit, at))
        first += job.units[unit]


def plan(job: Job, part_entries: int) -> Iterator[PartPlan]:
    """The parts of the build: those of `plan_parts`, each by where it begins."""
    for part in plan_parts(placed_rows(job), job.identity.windows, part_entries, job.bos_token_id):
        begin = part.pieces[0]
        place = cast(PlacedRow, begin.document).place  # as all that were given
        yield PartPlan(part.number, part.lo, part.hi, place, begin.window.first)


def part_of(job: Job, planned: PartPlan) -> Part:
    """The part with its windows, read again from where it begins."""
    windows = job.identity.windows
    bos = job.bos_token_id if windows.bos == "window" else None
    pieces: list[Piece] = []
    entry, first = planned.lo, planned.first
    for row in placed_rows(job, planned.place):
        for window in plan_fed_windows(row.tokens, windows.context_length, windows.min_context, bos):
            if window.first < first:
                continue
            pieces.append(Piece(row, window, entry))
            entry += pieces[-1].entries
            if entry >= planned.hi:
                return Part(planned.number, planned.lo, planned.hi, tuple(pieces))
        first = 0
    raise DatastoreCorrupt(f"{job.folder} has no {planned.hi} entries: its units have changed")


class UnitTokens:
    """The tokens of all units, one after another; each file is opened when it is first asked for."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._firsts = np.cumsum([0, *job.units])
        self._open: tuple[int, npt.NDArray[np.int32]] | None = None

    def __getitem__(self, part: slice) -> npt.NDArray[np.int32]:
        unit = int(np.searchsorted(self._firsts, part.start, side="right")) - 1
        if self._open is None or self._open[0] != unit:
            file = unit_folder(self._job.folder, unit) / TOKENS
            self._open = unit, open_array(file, (self._job.units[unit],), "<i4")
        first = int(self._firsts[unit])
        return self._open[1][part.start - first : part.stop - first]


def part_rows(job: Job, planned: PartPlan, kind: str) -> PartRows:
    """The keys or the values of a part. kind: "keys" or "values"."""
    entries = planned.hi - planned.lo
    shape, dtype = ((entries, job.identity.key_dim), job.identity.key_dtype) if kind == "keys" else ((entries,), "i4")
    name, stored = f"{planned.number:05d}.{kind}", np.dtype(dtype).newbyteorder("<")
    if job.parts_at is not None:
        return ObjectRows(below(job.parts_at, name), planned.lo, shape, stored)
    return FileRows(job.folder / PARTS / f"{name}.npy", planned.lo, shape, stored)


def encode_part(lm: LanguageModel, job: Job, tokens: UnitTokens, planned: PartPlan, node: str) -> Done:
    """Make a part's keys, unless that was done. Raises as `Encoder.finish` does."""
    encoder = Encoder(
        lm,
        tokens,
        part_rows(job, planned, "keys"),
        part_rows(job, planned, "values"),
        key_dtype=job.identity.key_dtype,
        batch_tokens=job.batch_tokens,
        records=job.folder / PARTS,
    )
    part = part_of(job, planned)
    done = Done(node, entries=planned.hi - planned.lo)
    if encoder.finished(part):
        return replace(done, resumed=True)
    fed: list[int] = []
    encoder.finish(part, fed.append)
    return replace(done, tokens=sum(fed))


def make_shard(
    job: Job, shard: ShardPlan, place: Place, parts: Sequence[PartPlan], tokenizer: str, names: dict[str, str]
) -> Done:
    """Write a shard, unless that was done. place: of its first document. parts: those that have its entries. names: its
    domain and version. Raises DatastoreCorrupt, and has it made anew by the next run, for a part that is damaged."""
    target = job.folder / shard_name(shard.number)
    done = Done("", entries=shard.counts["entries"])
    if (target / MANIFEST).exists() and _is_whole(target, shard):
        return replace(done, resumed=True)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    fields = {n: getattr(job.identity, n) for n in ("model", "key_function", "windows", "key_dim", "key_dtype")}
    write_shard(draft, shard, _texts(job, shard, place), _keys(job, shard, parts), tokenizer, {**fields, **names})
    shutil.rmtree(target, ignore_errors=True)
    _rename(draft, target)
    return done


def _is_whole(folder: Path, shard: ShardPlan) -> bool:
    try:
        manifest = Manifest.load(folder)
    except DatastoreError:
        return False
    counts = {name: getattr(manifest, name) for name in ("documents", "entries", "tokens")}
    sizes = all(
        (folder / name).is_file() and (folder / name).stat().st_size == r.bytes for name, r in manifest.files.items()
    )
    return sizes and counts == shard.counts


def _texts(job: Job, shard: ShardPlan, place: Place) -> Iterator[tuple[Row, npt.NDArray[np.int32]]]:
    tokens = UnitTokens(job)
    left = shard.counts["documents"]
    for row in placed_rows(job, place):
        if not left:
            return
        left -= 1
        yield row, tokens[row.start : row.start + row.tokens] if row.tokens else np.empty(0, np.int32)


def _keys(job: Job, shard: ShardPlan, parts: Sequence[PartPlan]) -> Iterator[npt.NDArray[np.floating]]:
    lo, hi = shard.entries
    for part in parts:
        record = record_path(job.folder / PARTS, part.number)
        found = PartRecord.model_validate_json(record.read_bytes())
        keys = part_rows(job, part, "keys").read()
        if found.keys_sha256 != hashlib.sha256(keys.data).hexdigest():
            record.unlink()
            raise DatastoreCorrupt(f"{record} does not say what its keys are: the same command makes the part again")
        yield keys[max(lo - part.lo, 0) : hi - part.lo]


def _rename(draft: Path, target: Path) -> None:
    """Make a folder appear, unless another worker was first with the same."""
    with disk_errors(target):
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            shutil.rmtree(draft, ignore_errors=True)
        sync_folder(target.parent)
