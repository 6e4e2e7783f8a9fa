"""`knnlm cluster build`: a version of shards, made by the workers of a Ray cluster.

Phases: files to tokens, tokens to keys, keys to shards, one training, an index for each shard, verification. Workers
read and write the build's folder, which every node sees; what goes through Ray is where things are. Each piece of work
is done or not done on disk, so whoever dies, the same command goes on and loses the pieces that were being made. This
process holds the lock, plans, and publishes by one rename.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knnlm.cluster.parts import Done, Job, PartPlan, Place, make_shard, placed_rows, plan
from knnlm.cluster.pool import LOCAL, START_SECONDS, Pool, connected, resources, run_tasks, stored
from knnlm.cluster.sources import source_files, units
from knnlm.cluster.worker import Described, KeyMaker, ModelSource, add, checked, describe, tokenize, train
from knnlm.datastore.build import check_sizes, identity_of
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.corpus import Sources
from knnlm.datastore.files import discard, disk_errors, write_atomic
from knnlm.datastore.layout import TOKENIZER, TOKENS, FileRecord, Record, shard_name
from knnlm.datastore.manifest import FLAT, IndexRecord, Manifest
from knnlm.datastore.progress import Clock, Progress, Report, silent
from knnlm.datastore.shards import MAX_SHARDS, ShardPlan, plan_shards, sharded_manifest
from knnlm.datastore.workspace import Workspace, workspace
from knnlm.errors import Conflict, DatastoreCorrupt, InvalidRequest
from knnlm.evaluation.splits import Part

SHARD_BYTES = 64 << 30  # keys and values of one shard, where neither their number nor their size was asked for
PART_ENTRIES = 16_384
MAX_TRAINING_CPUS = 16
VALUE_BYTES = 8  # an entry's value and token


@dataclass(frozen=True)
class Workers:
    """address: of the cluster, "local" for one in this process. count: how many hold the model, None = one for each
    GPU, where there is none for each `cpus` processors. processors: that a cluster in this process says it has, None =
    as many as there are."""

    address: str = LOCAL
    count: int | None = None
    cpus: int = 2
    processors: int | None = None


@dataclass(frozen=True)
class Plan:
    """What is to be built, as `knnlm.datastore.build.build` takes it; index: auto, a recipe, or flat. shards or
    shard_bytes: how many, or how large at most, by their keys and values."""

    model: ModelSource
    version: str | None = None
    part: Part = Part.ALL
    context_length: int | None = None
    min_context: int | None = None
    bos: str = "document"
    key_dtype: str = "float16"
    batch_tokens: int = 8192
    part_entries: int = PART_ENTRIES
    index: str = "auto"
    seed: int = 0
    shards: int | None = None
    shard_bytes: int | None = None


def build(
    sources: Sequence[str],
    catalog: Catalog,
    domain: str,
    wanted: Plan,
    workers: Workers,
    *,
    on_progress: Report | None = None,
) -> tuple[Path, list[str]]:
    """Publish the documents of `sources` as a version of `domain` and return its folder, and why it has this index; it
    is not activated.

    Entries, their order and their keys are those of knnlm.datastore.build.build with the same model, on the same
    hardware. Raises as that does, as reading documents and building indexes do; Unavailable when there is no cluster or
    no worker can be started. After every error and every kill, the same call goes on.
    """
    _check(wanted, workers)
    report = on_progress or silent
    target = catalog.folder(domain, catalog.next_version(domain) if wanted.version is None else wanted.version)
    catalog = Catalog(catalog.store.absolute())
    target = catalog.store / domain / target.name
    files = source_files(sources)
    with disk_errors(catalog.store):
        catalog.store.mkdir(parents=True, exist_ok=True)
    report(Progress("start", 0, 0, 0, 0.0))
    with connected(workers.address, workers.processors):
        run = _Run(wanted, workers, report)
        model = run.described(catalog.store)
        identity = identity_of(model.info, wanted.context_length, wanted.min_context, wanted.bos, wanted.key_dtype)
        with workspace(target, identity) as space:
            if (space.folder / TOKENS).exists():
                raise Conflict(f"{space.folder} was begun by `knnlm build`: continue with that, or remove the folder")
            sources_of = run.tokenized(space, model, files)
            job = Job(space.folder, identity, tuple(s.tokens for s in sources_of), wanted.batch_tokens)
            total = _total(sources_of)
            if not total.entries:
                space.abandon()
                raise InvalidRequest("no document with a token to predict: expected at least one", param="documents")
            number = _shards(wanted, total.entries, identity.key_dim, 2 if identity.key_dtype == "float16" else 4)
            shards, places = _planned(job, number, total.entries)
            _refuse_other_shards(space, number)
            space.check_sources(total.sha256)
            if space.state.sources is None:
                space.complete_sources(total)
            run.encoded(job, total.entries)
            run.sharded(job, shards, places, model.tokenizer, {"domain": domain, "version": target.name}, total.entries)
            folders = [space.folder / shard_name(n) for n in range(number)]
            write_atomic(space.folder / TOKENIZER, model.tokenizer.encode())
            index, reasons = run.indexed(space.folder, folders, total.entries, identity.key_dim)
            run.verified(folders, total.entries)
            report(Progress("publish", total.entries, total.entries, 0, 0.0))
            _publish(space, folders, index, target)
    return target, reasons


def _check(wanted: Plan, workers: Workers) -> None:
    check_sizes(batch_tokens=wanted.batch_tokens, part_entries=wanted.part_entries, worker_cpus=workers.cpus)
    for name, value in (
        ("shards", wanted.shards), ("shard_bytes", wanted.shard_bytes), ("workers", workers.count)
    ):  # fmt: skip
        if value is not None:
            check_sizes(**{name: value})
    if wanted.shards is not None and wanted.shard_bytes is not None:
        raise InvalidRequest("expected either shards or shard_bytes, not both", param="shards")
    if wanted.index not in ("auto", FLAT):
        from knnlm.index.table import family

        family(wanted.index)


class Trained(Record):
    """trained.json: what was learned, and of what."""

    identity: str
    index: IndexRecord


class _Run:
    """The phases of one build, each on the whole cluster."""

    def __init__(self, wanted: Plan, workers: Workers, report: Report) -> None:
        self._wanted = wanted
        self._workers = workers
        self._report = report
        processors, gpus, self._node_cpus = resources()
        self._gpus = gpus if wanted.model.device != "cpu" else 0
        if not self._gpus and workers.cpus > self._node_cpus:
            raise InvalidRequest(
                f"worker_cpus must be at most {self._node_cpus}, as the largest node has, got {workers.cpus}",
                param="worker_cpus",
            )
        self._size = workers.count or self._gpus or max(1, processors // workers.cpus)

    def described(self, store: Path) -> Described:
        """The model, as one worker sees it."""
        found: list[Described] = []
        work = [(self._wanted.model, store)]
        run_tasks(describe, work, lambda _, made: found.append(made), **self._needs(), within=START_SECONDS)
        return found[0]

    def tokenized(self, space: Workspace, model: Described, files: Sequence[Any]) -> list[Sources]:
        """The counts of every unit, in order."""
        cut = list(units(files))
        found: dict[int, Sources] = {}
        clock, tokens, entries = Clock(), 0, 0

        def done(number: int, made: Sources) -> None:
            nonlocal tokens, entries
            found[number] = made
            tokens, entries = tokens + made.tokens, entries + made.entries
            self._report(Progress("tokenize", entries, 0, tokens, clock.seconds, detail=f"{len(found)} of {len(cut)}"))

        parse_special = space.state.identity.windows.parse_special
        once = stored(model)
        work = ((space.folder, n, unit, self._wanted.part, once, parse_special) for n, unit in enumerate(cut))
        run_tasks(tokenize, work, done)
        extra = space.folder / ".build" / "units" / f"{len(cut):05d}"
        if extra.exists():
            raise Conflict(f"{space.folder} was begun with more documents: continue it with them, or remove the folder")
        return [found[number] for number in range(len(cut))]

    def encoded(self, job: Job, entries: int) -> None:
        tokens: Counter[str] = Counter()
        clock, done_entries, resumed = Clock(), 0, 0

        def done(planned: PartPlan, made: Done) -> None:
            nonlocal done_entries, resumed
            del planned
            done_entries += made.entries
            resumed += made.entries if made.resumed else 0
            tokens[made.node] += made.tokens
            rates = [f"{node} {count / max(clock.seconds, 1e-9):,.0f}/s" for node, count in sorted(tokens.items())]
            fed = sum(tokens.values())
            self._report(
                Progress("encode", done_entries, entries, fed, clock.seconds, resumed, detail=", ".join(rates))
            )

        pool: Pool[Done] = Pool(lambda: self._actor(KeyMaker, self._wanted.model, job), self._size)
        try:
            pool.run(plan(job, self._wanted.part_entries), done)
        finally:
            pool.close()

    def sharded(
        self, job: Job, shards: Sequence[ShardPlan], places: Sequence[Place], tokenizer: str, names: dict[str, str],
        entries: int,
    ) -> None:  # fmt: skip
        clock, done_entries, resumed = Clock(), 0, 0

        def done(number: int, made: Done) -> None:
            nonlocal done_entries, resumed
            del number
            done_entries += made.entries
            resumed += made.entries if made.resumed else 0
            self._report(Progress("shards", done_entries, entries, 0, clock.seconds, resumed))

        parts = _parts_of(shards, plan(job, self._wanted.part_entries))
        work = (
            (job, shard, place, mine, tokenizer, names)
            for shard, place, mine in zip(shards, places, parts, strict=True)
        )
        run_tasks(make_shard, work, done)

    def indexed(self, folder: Path, folders: Sequence[Path], entries: int, dim: int) -> tuple[IndexRecord, list[str]]:
        """The index of all shards, and why this one."""
        from knnlm.index.build import suiting
        from knnlm.index.sharded_build import Added, joined, settle, share_parameters

        choice = suiting(entries, dim, self._wanted.index, str(folder))
        index = self._trained(folder, folders, choice.recipe)
        clock, done_entries, parts = Clock(), 0, {}

        def done(number: int, made: Any) -> None:
            nonlocal done_entries
            parts[number] = Added(*made)
            done_entries += Manifest.load(folders[number]).entries
            self._report(Progress("index", done_entries, entries, 0, clock.seconds, detail=choice.recipe))

        if index.file is not None:
            path = folder / index.file
            run_tasks(add, ((shard, path, index) for shard in folders), done)
            index = joined([parts[number] for number in range(len(folders))], index)
            share_parameters(folders, index)
        settle(folders, index.recipe, [index.recipe])
        return index, list(choice.reasons)

    def _trained(self, folder: Path, folders: Sequence[Path], recipe: str) -> IndexRecord:
        """What all shards' indexes begin with; what an earlier run learned of the same keys is taken."""
        file, identity = folder / ".build" / "trained.json", f"{recipe} {self._wanted.seed} {len(folders)}"
        if file.exists():
            found = Trained.model_validate_json(file.read_bytes())
            name = found.index.file
            if found.identity == identity and (name is None or (folder / name).exists()):
                return found.index
        self._report(Progress("train", 0, 0, 0, 0.0, detail=recipe))
        trained: list[IndexRecord] = []
        cpus = max(1, min(self._node_cpus, MAX_TRAINING_CPUS))
        work = [(list(folders), recipe, self._wanted.seed, folder)]
        run_tasks(train, work, lambda _, made: trained.append(made), cpus=cpus)
        write_atomic(file, Trained(identity=identity, index=trained[0]).model_dump_json().encode())
        return trained[0]

    def verified(self, folders: Sequence[Path], entries: int) -> None:
        clock, done_entries = Clock(), 0
        problems: list[str] = []

        def done(number: int, found: list[str]) -> None:
            nonlocal done_entries
            done_entries += Manifest.load(folders[number]).entries
            problems.extend(found)
            if found:
                discard(folders[number])
            self._report(Progress("verify", done_entries, entries, 0, clock.seconds))

        run_tasks(checked, ((shard,) for shard in folders), done)
        if problems:
            raise DatastoreCorrupt(f"{problems[0]}: the same command makes that shard again")

    def _actor(self, kind: type, *arguments: Any) -> Any:
        import ray

        needs = {f"num_{name}": number for name, number in self._needs().items()}
        return ray.remote(max_restarts=0, scheduling_strategy="SPREAD", **needs)(kind).remote(*arguments)

    def _needs(self) -> dict[str, int]:
        return {"gpus": 1, "cpus": 1} if self._gpus else {"cpus": self._workers.cpus}


def _parts_of(shards: Sequence[ShardPlan], parts: Iterator[PartPlan]) -> Iterator[list[PartPlan]]:
    """The parts that have some entries of each shard."""
    mine: list[PartPlan] = []
    for shard in shards:
        lo, hi = shard.entries
        mine = [part for part in mine if part.hi > lo]
        while not mine or mine[-1].hi < hi:
            mine.append(next(parts))
        yield list(mine)


def _planned(job: Job, shards: int, entries: int) -> tuple[list[ShardPlan], list[Place]]:
    """The shards, and where the first document of each stands."""
    plans = plan_shards(placed_rows(job), shards, entries)
    starts, places = {shard.documents[0] for shard in plans}, []
    for number, row in enumerate(placed_rows(job)):
        if number in starts:
            places.append(row.place)
    return plans, places


def _shards(wanted: Plan, entries: int, dim: int, bytes_per_number: int) -> int:
    if wanted.shards is not None:
        return wanted.shards
    size = entries * (dim * bytes_per_number + VALUE_BYTES)
    number = math.ceil(size / (wanted.shard_bytes or SHARD_BYTES))
    if number > MAX_SHARDS:
        raise InvalidRequest(
            f"{size} bytes in shards of {wanted.shard_bytes} would be {number}, at most {MAX_SHARDS} are possible",
            param="shard_bytes",
        )
    return number


def _refuse_other_shards(space: Workspace, shards: int) -> None:
    """Shards that another number of them was begun with are made anew; the keys stay. What killed workers left goes."""
    for draft in space.folder.glob(".shard-*"):
        discard(draft)
    file = space.folder / ".build" / "shards"
    if file.exists() and file.read_text(encoding="utf-8") == str(shards):
        return
    for former in space.folder.glob("shard-*"):
        discard(former)
    write_atomic(file, str(shards).encode())


def _total(sources: Sequence[Sources]) -> Sources:
    counts = {name: sum(getattr(s, name) for s in sources) for name in ("documents", "tokens", "entries")}
    digest = hashlib.sha256(" ".join(s.sha256 for s in sources).encode()).hexdigest()
    return Sources(sha256=digest, **counts)


def _publish(space: Workspace, folders: Sequence[Path], index: IndexRecord, target: Path) -> None:
    names = [TOKENIZER, *([index.file] if index.file else [])]
    files = {name: FileRecord.of(space.folder / name) for name in names}
    for leftover in (*space.folder.glob("index.*"), *space.folder.glob(".shard-*"), *space.folder.glob(".index.*")):
        if leftover.name not in files:
            discard(leftover) if leftover.is_dir() else leftover.unlink()
    manifest = sharded_manifest([Manifest.load(folder) for folder in folders], index, files)
    manifest.save(space.folder)
    space.publish(target)
