"""Making targets: p_kNN of every entry of a version, sparse and made once. Maths: knnlm/neighbors.py.

Written in parts, in the order in which the index groups the entries; a part that is on disk is whole, so that a run
that was killed loses the part it was in. At the end the parts are put together by entry.
"""

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from knnlm.datastore.arrays import ArrayStream
from knnlm.datastore.files import disk_errors, locked, sync_folder, write_atomic
from knnlm.datastore.layout import FileRecord
from knnlm.datastore.reader import Datastore
from knnlm.errors import Conflict
from knnlm.memory.manifest import (
    TARGETS,
    Begun,
    Shape,
    StoreRecord,
    TargetSettings,
    TargetsManifest,
    load,
    save,
)
from knnlm.memory.targets import ENTRIES, KEPT, MASSES, OFFSETS, TOKENS, Int64, token_dtype
from knnlm.messages import SearchRequest
from knnlm.neighbors import TokenMasses, neighbor_log_probs, stacked
from knnlm.options import SearchOptions
from knnlm.protocols import Searching

SETTINGS = "settings.json"
BLOCK_ROWS = 512  # entries searched for at a time
MERGED_ENTRIES = 1 << 20  # entries whose rows are held at once while parts are put together
LEAST_MASS = 2.0**-14  # the smallest number that float16 holds with all its digits; what is smaller is not kept

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Rows:
    """Distributions of some entries. ids: (n,) int64 ascending. masses: n rows that sum to one. Of p_kNN before it was
    cut, (n,) each: kept, the mass of what was kept; entropy; largest; support; of_value."""

    ids: Int64
    masses: TokenMasses
    kept: npt.NDArray[np.float64]
    entropy: npt.NDArray[np.float64]
    largest: npt.NDArray[np.float64]
    support: Int64
    of_value: npt.NDArray[np.float64]

    @property
    def sums(self) -> npt.NDArray[np.float64]:
        """(6,) over rows that are not empty: rows, and the five numbers above."""
        some = self.support > 0
        columns = (np.ones(len(some)), self.kept, self.entropy, self.largest, self.support, self.of_value)
        return np.array([column[some].sum(dtype=np.float64) for column in columns])


def target_rows(
    searching: Searching,
    datastore: Datastore,
    ids: Int64,
    settings: TargetSettings,
    on_progress: Callable[[int], None] | None = None,
) -> Rows:
    """The targets of entries (n,), ascending: p_kNN for their stored keys by squared L2 to stored keys, without what
    settings.exclude says, cut to the settings.top likeliest tokens and made to sum to one. on_progress: called with the
    entries done so far."""
    manifest = datastore.manifest
    wanted = {**settings.search, "k": settings.k, "rescore": True}
    options = SearchOptions.of(wanted | {"exclude_own_documents": settings.exclude == "document"})
    parts, values = [], []
    for start in range(0, len(ids), BLOCK_ROWS):
        some = ids[start : start + BLOCK_ROWS]
        request = SearchRequest(
            manifest.domain, datastore.keys_of(some), options, manifest.version, exclude_entries=some
        )
        parts.append(neighbor_log_probs(searching.search(request).neighbors, settings.temperature))
        values.append(datastore.values_of(some))
        if on_progress is not None:
            on_progress(start + len(some))
    return _summed_up(ids, stacked(parts), np.concatenate(values), settings.top)


def make_targets(
    searching: Searching,
    datastore: Datastore,
    order: Int64,
    begun: Begun,
    out: Path,
    on_progress: Progress,
) -> TargetsManifest:
    """Write the targets of all entries in `order` (n,) to the folder `out`. Continues a run that was stopped.

    order: live entries of the version; those that come together find the same parts of the index. Beside the index,
    memory holds a part, or MERGED_ENTRIES rows at the end. Raises Conflict when `out` exists or belongs to targets of
    other settings, DatastoreError when the disk is full, and as searching does.
    """
    settings = begun.settings
    work = _begin(out, begun)
    with locked(work, wait=False, doing="making these targets"):
        if not (work / TARGETS).exists():
            parts = [work / f"part-{i:05d}.npz" for i in range(-(-len(order) // settings.part_entries))]
            sums = np.zeros(6)
            for i, part in enumerate(parts):
                done = i * settings.part_entries

                def told(rows: int, done: int = done) -> None:
                    on_progress("neighbors of every entry", done + rows, len(order))

                told(0)
                ids = np.sort(order[done : done + settings.part_entries])
                rows = _read_part(part, ids)
                if rows is None:
                    rows = target_rows(searching, datastore, ids, settings, told)
                    write_atomic(part, _packed(rows))
                sums += rows.sums
            on_progress("putting parts together", len(order), len(order))
            masses = _merge(parts, work, datastore.manifest.model.vocab_size)
            names = (ENTRIES, OFFSETS, TOKENS, MASSES, KEPT)
            files = {name: FileRecord.of(work / name) for name in names}
            save(_manifest(datastore, begun, len(order), masses, sums, files), work / TARGETS)
        for leftover in (*work.glob("part-*.npz"), *work.glob(".*.tmp"), work / SETTINGS):
            leftover.unlink(missing_ok=True)
        with disk_errors(out):
            work.rename(out)
            sync_folder(out.parent)
    return load(TargetsManifest, out / TARGETS)


def begun_with(out: Path) -> Begun | None:
    """What an unfinished run for `out` was begun with; None when there is none. Raises Conflict when `out` exists."""
    if out.exists():
        raise Conflict(f"{out} exists already: remove it, or name another folder", param="out")
    work = _work(out)
    if (work / TARGETS).exists():
        made = load(TargetsManifest, work / TARGETS)
        return Begun(settings=made.settings, fit=made.fit)
    return load(Begun, work / SETTINGS) if (work / SETTINGS).exists() else None


def _begin(out: Path, wanted: Begun) -> Path:
    """The folder that the targets are made in, made or continued. Raises Conflict as `make_targets`."""
    begun, work = begun_with(out), _work(out)
    earlier = wanted if begun is None else begun
    for name in TargetSettings.model_fields:
        old, new = getattr(earlier.settings, name), getattr(wanted.settings, name)
        if old != new:
            raise Conflict(
                f"{work} was begun with {name} {old!r}, asked for is {new!r}: continue it as it was begun, or remove "
                "the folder",
                param=name,
            )
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    if begun is None:
        save(wanted, work / SETTINGS)
    return work


def shape_of(sums: npt.NDArray[np.float64]) -> Shape:
    """Means, of `Rows.sums`."""
    _, _, entropy, largest, support, of_value = (sums / max(sums[0], 1)).tolist()
    return Shape(entropy=entropy, largest=largest, support=support, of_value=of_value)


def _summed_up(ids: Int64, found: TokenMasses, values: npt.NDArray[np.int32], top: int) -> Rows:
    """found: p_kNN, whole; values (n,): the tokens that came."""
    rows, p = found.rows, np.exp(found.log_masses)
    n = len(found)
    order = np.lexsort((found.tokens, -found.log_masses, rows))  # likeliest first, of equal ones the lower token
    rank = np.empty(len(p), np.int64)
    rank[order] = np.arange(len(p)) - found.offsets[rows[order]]
    kept = rank < top
    for _ in range(2):  # what float16 would hold badly is left out, and the rest made to sum to one again
        total = _row_sums(rows[kept], p[kept], n)
        kept &= p >= LEAST_MASS * total[rows]
    total = _row_sums(rows[kept], p[kept], n)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows[kept], minlength=n))]).astype(np.int64)
    masses = TokenMasses(offsets, found.tokens[kept], found.log_masses[kept]).normalized()
    largest = np.zeros(n)
    np.maximum.at(largest, rows, p)
    entropy = _row_sums(rows, -p * found.log_masses, n)
    return Rows(ids, masses, total, entropy, largest, np.diff(found.offsets), np.exp(found.of(values)))


def _row_sums(rows: Int64, numbers: npt.NDArray[np.float64], n: int) -> npt.NDArray[np.float64]:
    return np.bincount(rows, numbers, n).astype(np.float64)  # of no numbers it makes integers


def _packed(rows: Rows) -> bytes:
    buffer = io.BytesIO()
    stored: dict[str, npt.NDArray[Any]] = {"offsets": rows.masses.offsets, "tokens": rows.masses.tokens}
    stored["masses"] = np.exp(rows.masses.log_masses).astype("<f2")
    columns = {name: getattr(rows, name) for name in ("ids", "kept", "entropy", "largest", "support", "of_value")}
    np.savez(buffer, allow_pickle=False, **(stored | columns))
    return buffer.getvalue()


def _read_part(file: Path, ids: Int64) -> Rows | None:
    """The rows of entries `ids` that an earlier run left, None where they are not there, or not sound: the parts of the
    file have checksums of their own."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays: Mapping[str, Any] = dict(stored)  # Any: arrays of several types
        masses = TokenMasses(arrays["offsets"], arrays["tokens"], np.log(arrays["masses"].astype(np.float64)))
        columns = [arrays[name] for name in ("kept", "entropy", "largest", "support", "of_value")]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Rows(ids, masses, *columns) if np.array_equal(arrays["ids"], ids) else None


def _merge(parts: list[Path], folder: Path, vocab_size: int) -> int:
    """Write the rows of all parts in the order of their entries; how many masses they have."""
    ids = [_column(part, "ids") for part in parts]
    most = max((int(part[-1]) + 1 for part in ids if len(part)), default=0)
    with (
        ArrayStream(folder / ENTRIES, "<i8") as entries,
        ArrayStream(folder / OFFSETS, "<i8") as offsets,
        ArrayStream(folder / TOKENS, token_dtype(vocab_size)) as tokens,
        ArrayStream(folder / MASSES, "<f2") as masses,
        ArrayStream(folder / KEPT, "<f4") as kept,
    ):
        offsets.append(np.zeros(1, np.int64))
        for low in range(0, most, MERGED_ENTRIES):
            rows = list(_between(parts, ids, low, low + MERGED_ENTRIES))
            block = np.concatenate([part_ids for part_ids, _, _ in rows])
            order = np.argsort(block)
            whole = stacked([part for _, part, _ in rows])
            counts = np.diff(whole.offsets)[order]
            ends = np.cumsum(counts)
            flat = np.repeat(whole.offsets[:-1][order] - (ends - counts), counts) + np.arange(counts.sum())
            entries.append(block[order])
            offsets.append(tokens.length + ends)
            tokens.append(whole.tokens[flat])
            masses.append(whole.log_masses[flat])
            kept.append(np.concatenate([column for _, _, column in rows])[order])
        for stream in (entries, offsets, tokens, masses, kept):
            stream.finish()
        return masses.length


def _between(
    parts: list[Path], ids: list[Int64], low: int, high: int
) -> Iterator[tuple[Int64, TokenMasses, npt.NDArray[np.float64]]]:
    """Rows of entries [low, high) in each part: ids, masses as they are stored, and what was kept."""
    for part, known in zip(parts, ids, strict=True):
        first, last = np.searchsorted(known, (low, high))
        rows = TokenMasses(_column(part, "offsets"), _column(part, "tokens"), _column(part, "masses"))
        yield known[first:last], rows.part(int(first), int(last)), _column(part, "kept")[first:last]


def _column(part: Path, name: str) -> Any:  # Any: arrays of several types
    with np.load(part, allow_pickle=False) as stored:
        return stored[name]


def _manifest(
    datastore: Datastore,
    begun: Begun,
    entries: int,
    masses: int,
    sums: npt.NDArray[np.float64],
    files: dict[str, FileRecord],
) -> TargetsManifest:
    made = datastore.manifest
    rows = int(sums[0])
    return TargetsManifest(
        store=StoreRecord.of(made),
        model=made.model,
        key_function=made.key_function,
        windows=made.windows,
        files=files,
        settings=begun.settings,
        rows=rows,
        empty=entries - rows,
        masses=masses,
        kept=float(sums[1] / max(rows, 1)),
        shape=shape_of(sums),
        fit=begun.fit,
    )


def _work(out: Path) -> Path:
    return out.with_name(f".{out.name}.building")
