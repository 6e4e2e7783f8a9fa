"""The phases of a build, each on the whole cluster: files to tokens, tokens to keys, keys to shards, one training, an
index for each shard, verification. What an earlier run finished of one is not done again.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from knnlm.cluster.parts import Done, Job, PartPlan, Place, make_shard, plan, unit_folder
from knnlm.cluster.plan import Plan, Workers
from knnlm.cluster.pool import START_SECONDS, Pool, free_processors, resources, run_tasks, stored
from knnlm.cluster.sources import SourceFile, units
from knnlm.cluster.worker import Described, KeyMaker, add, checked, describe, tokenize, train
from knnlm.datastore.corpus import Sources
from knnlm.datastore.files import discard, write_atomic
from knnlm.datastore.layout import BUILD_FOLDER, Record
from knnlm.datastore.manifest import IndexRecord, Manifest
from knnlm.datastore.progress import Clock, Progress, Report
from knnlm.datastore.shards import ShardPlan
from knnlm.datastore.workspace import Workspace
from knnlm.errors import Conflict, DatastoreCorrupt, InvalidRequest

MAX_TRAINING_CPUS = 16


class Trained(Record):
    """trained.json: what was learned, and of what."""

    identity: str
    index: IndexRecord


class Phases:
    """The phases of one build."""

    def __init__(self, wanted: Plan, workers: Workers, report: Report) -> None:
        self.wanted = wanted
        self._workers = workers
        self.report = report
        processors, gpus, self._node_cpus = resources()
        self._gpus = gpus if wanted.model.device != "cpu" else 0
        if not self._gpus and workers.cpus > self._node_cpus:
            raise InvalidRequest(
                f"worker_cpus must be at most {self._node_cpus}, as the largest node has, got {workers.cpus}",
                param="worker_cpus",
            )
        self._size = workers.count or self._gpus or max(1, processors // workers.cpus)

    def describe(self, store: Path) -> Described:
        """The model, as one worker sees it."""
        found: list[Described] = []
        work = [(self.wanted.model, store)]
        run_tasks(describe, work, lambda _, made: found.append(made), **self._needs(), within=START_SECONDS)
        return found[0]

    def tokenize(self, space: Workspace, model: Described, files: Sequence[SourceFile]) -> list[Sources]:
        """The counts of every unit, in order."""
        cut = list(units(files))
        found: dict[int, Sources] = {}
        clock, tokens, entries = Clock(), 0, 0

        def done(number: int, made: Sources) -> None:
            nonlocal tokens, entries
            found[number] = made
            tokens, entries = tokens + made.tokens, entries + made.entries
            self.report(Progress("tokenize", entries, 0, tokens, clock.seconds, detail=f"{len(found)} of {len(cut)}"))

        parse_special = space.state.identity.windows.parse_special
        once = stored(model)
        work = ((space.folder, n, unit, self.wanted.part, once, parse_special) for n, unit in enumerate(cut))
        run_tasks(tokenize, work, done)
        extra = unit_folder(space.folder, len(cut))
        if extra.exists():
            raise Conflict(f"{space.folder} was begun with more documents: continue it with them, or remove the folder")
        return [found[number] for number in range(len(cut))]

    def encode(self, job: Job, entries: int) -> None:
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
            self.report(Progress("encode", done_entries, entries, fed, clock.seconds, resumed, detail=", ".join(rates)))

        pool: Pool[Done] = Pool(lambda: self._actor(KeyMaker, self.wanted.model, job), self._size)
        try:
            pool.run(plan(job, self.wanted.part_entries), done)
        finally:
            pool.close()

    def write_shards(
        self, job: Job, shards: Sequence[ShardPlan], places: Sequence[Place], tokenizer: str, names: dict[str, str],
        entries: int,
    ) -> None:  # fmt: skip
        clock, done_entries, resumed = Clock(), 0, 0

        def done(number: int, made: Done) -> None:
            nonlocal done_entries, resumed
            del number
            done_entries += made.entries
            resumed += made.entries if made.resumed else 0
            self.report(Progress("shards", done_entries, entries, 0, clock.seconds, resumed))

        parts = _parts_of(shards, plan(job, self.wanted.part_entries))
        work = (
            (job, shard, place, mine, tokenizer, names)
            for shard, place, mine in zip(shards, places, parts, strict=True)
        )
        run_tasks(make_shard, work, done)

    def index(self, folder: Path, folders: Sequence[Path], entries: int, dim: int) -> tuple[IndexRecord, list[str]]:
        """The index of all shards, and why this one."""
        from knnlm.index.build import suiting
        from knnlm.index.sharded_build import Added, joined, settle, share_parameters

        choice = suiting(entries, dim, self.wanted.index, str(folder))
        index = self._train(folder, folders, choice.recipe)
        clock, done_entries, parts = Clock(), 0, {}

        def done(number: int, made: Any) -> None:
            nonlocal done_entries
            parts[number] = Added(*made)
            done_entries += Manifest.load(folders[number]).entries
            self.report(Progress("index", done_entries, entries, 0, clock.seconds, detail=choice.recipe))

        if index.file is not None:
            path = folder / index.file
            run_tasks(add, ((shard, path, index) for shard in folders), done)
            index = joined([parts[number] for number in range(len(folders))], index)
            share_parameters(folders, index)
        settle(folders, index.recipe, [index.recipe])
        return index, list(choice.reasons)

    def _train(self, folder: Path, folders: Sequence[Path], recipe: str) -> IndexRecord:
        """What all shards' indexes begin with; what an earlier run learned of the same keys is taken."""
        file, identity = folder / BUILD_FOLDER / "trained.json", f"{recipe} {self.wanted.seed} {len(folders)}"
        if file.exists():
            found = Trained.model_validate_json(file.read_bytes())
            name = found.index.file
            if found.identity == identity and (name is None or (folder / name).exists()):
                return found.index
        self.report(Progress("train", 0, 0, 0, 0.0, detail=recipe))
        trained: list[IndexRecord] = []
        cpus = free_processors(max(1, min(self._node_cpus, MAX_TRAINING_CPUS)))
        work = [(list(folders), recipe, self.wanted.seed, folder)]
        run_tasks(train, work, lambda _, made: trained.append(made), cpus=cpus)
        write_atomic(file, Trained(identity=identity, index=trained[0]).model_dump_json().encode())
        return trained[0]

    def verify(self, folders: Sequence[Path], entries: int) -> None:
        clock, done_entries = Clock(), 0
        problems: list[str] = []

        def done(number: int, found: list[str]) -> None:
            nonlocal done_entries
            done_entries += Manifest.load(folders[number]).entries
            problems.extend(found)
            if found:
                discard(folders[number])
            self.report(Progress("verify", done_entries, entries, 0, clock.seconds))

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
