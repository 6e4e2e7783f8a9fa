"""`knnlm cluster build`: a version of shards, made by the workers of a Ray cluster.

Workers read and write the build's folder, which every node sees; what goes through Ray is where things are. Each piece
of work is done or not done on disk, so whoever dies, the same command goes on and loses the pieces being made.
This process holds the lock, plans, publishes by one rename, and activates.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from pydantic import ValidationError

from knnlm.cluster.objects import discard_objects, make_folder
from knnlm.cluster.parts import Job, Place, placed_rows
from knnlm.cluster.phases import Phases
from knnlm.cluster.plan import Plan, Workers, check
from knnlm.cluster.pool import connected
from knnlm.cluster.sources import SourceFile, source_files
from knnlm.cluster.worker import Described
from knnlm.datastore.build import identity_of
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.corpus import Sources
from knnlm.datastore.files import discard, disk_errors, write_atomic
from knnlm.datastore.layout import BUILD_FOLDER, TOKENIZER, TOKENS, FileRecord, Record, shard_name
from knnlm.datastore.manifest import IndexRecord, Manifest
from knnlm.datastore.progress import Progress, Report, silent
from knnlm.datastore.shards import MAX_SHARDS, ShardPlan, plan_shards, sharded_manifest
from knnlm.datastore.workspace import Identity, Workspace, workspace
from knnlm.errors import Conflict, DatastoreCorrupt, InvalidRequest, UnknownDomain, UnknownVersion

__all__ = ["Plan", "Workers", "build"]

SHARD_BYTES = 64 << 30  # keys and values of one shard, where neither their number nor their size was asked for
VALUE_BYTES = 8  # an entry's value and token
PUBLISHED = ".published.json"  # in a version, until the command that made it has ended


def build(
    sources: Sequence[str],
    catalog: Catalog,
    domain: str,
    wanted: Plan,
    workers: Workers,
    *,
    activate: bool = False,
    on_progress: Report | None = None,
) -> tuple[Path, list[str]]:
    """Publish the documents of `sources` as a version of `domain` and return its folder, and why it has this index.
    activate: make it current.

    Entries, their order and their keys are those of knnlm.datastore.build.build with the same model, on the same
    hardware. Raises as that does, as reading documents and building indexes do; Unavailable when there is no cluster or
    no worker can be started. After every error and every kill, the same call goes on; one that was published and
    perhaps not activated yet is not built again.
    """
    check(wanted, workers)
    report = on_progress or silent
    target = catalog.folder(domain, catalog.next_version(domain) if wanted.version is None else wanted.version)
    catalog = Catalog(catalog.store.absolute())
    target = catalog.store / domain / target.name
    files = source_files(sources)
    with disk_errors(catalog.store):
        catalog.store.mkdir(parents=True, exist_ok=True)
    report(Progress("start", 0, 0, 0, 0.0))
    with connected(workers.address, workers.processors):
        run = Phases(wanted, workers, report)
        model = run.describe(catalog.store)
        identity = identity_of(model.info, wanted.context_length, wanted.min_context, wanted.bos, wanted.key_dtype)
        asked = _asked(wanted, identity, files)
        published = _published(catalog, domain, wanted.version, asked)
        if published is None:
            reasons = _made(run, target, model, identity, files, asked)
        else:
            target, reasons = published
    if activate:
        catalog.activate(domain, target.name)
    parts_at = wanted.parts_of(domain, target.name)
    if parts_at is not None:
        discard_objects(parts_at)
    with disk_errors(target):
        discard(target / BUILD_FOLDER)
        (target / PUBLISHED).unlink(missing_ok=True)
    return target, reasons


def _made(
    run: Phases, target: Path, model: Described, identity: Identity, files: Sequence[SourceFile], asked: str
) -> list[str]:
    """All phases: publish the version `target` and return why it has this index."""
    with workspace(target, identity) as space:
        if (space.folder / TOKENS).exists():
            raise Conflict(f"{space.folder} was begun by `knnlm build`: continue with that, or remove the folder")
        sources_of = run.tokenize(space, model, files)
        units = tuple(s.tokens for s in sources_of)
        parts_at = run.wanted.parts_of(target.parent.name, target.name)
        job = Job(space.folder, identity, units, run.wanted.batch_tokens, parts_at)
        total = _total(sources_of)
        if not total.entries:
            space.abandon()
            raise InvalidRequest("no document with a token to predict: expected at least one", param="documents")
        number = _shards(run.wanted, total.entries, identity.key_dim, 2 if identity.key_dtype == "float16" else 4)
        shards, places = _planned(job, number, total.entries)
        _refuse_other_shards(space, number)
        space.check_sources(total.sha256)
        if space.state.sources is None:
            space.complete_sources(total)
        if parts_at is not None:
            make_folder(parts_at, "parts_at")
        run.encode(job, total.entries)
        names = {"domain": target.parent.name, "version": target.name}
        run.write_shards(job, shards, places, model.tokenizer, names, total.entries)
        folders = [space.folder / shard_name(n) for n in range(number)]
        write_atomic(space.folder / TOKENIZER, model.tokenizer.encode())
        index, reasons = run.index(space.folder, folders, total.entries, identity.key_dim)
        run.verify(folders, total.entries)
        run.report(Progress("publish", total.entries, total.entries, 0, 0.0))
        made = Published(asked=asked, reasons=tuple(reasons))
        write_atomic(space.folder / PUBLISHED, made.model_dump_json().encode())
        _publish(space, folders, index, target)
    return reasons


class Published(Record):
    """.published.json in a version whose command has not ended. asked: what it was given; reasons: for its index."""

    asked: str
    reasons: tuple[str, ...]


def _asked(wanted: Plan, identity: Identity, files: Sequence[SourceFile]) -> str:
    """A digest of what makes a version: the model, the files, and all that was asked for but its name."""
    plan = {name: value for name, value in asdict(wanted).items() if name not in ("model", "version", "parts_at")}
    given = [identity.model_dump(mode="json"), [asdict(file) for file in files], plan]
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()


def _published(catalog: Catalog, domain: str, version: str | None, asked: str) -> tuple[Path, list[str]] | None:
    """The version, by default the domain's last one, when a command that was given the same made it and did not end."""
    with suppress(UnknownDomain, UnknownVersion):
        path = catalog.path(domain, catalog.versions(domain)[-1] if version is None else version)
        file = path / PUBLISHED
        try:
            found = Published.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as err:
            raise DatastoreCorrupt(f"{file} is damaged; remove it to build another version: {err}") from err
        return (path, list(found.reasons)) if found.asked == asked else None
    return None


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
    size, most = entries * (dim * bytes_per_number + VALUE_BYTES), wanted.shard_bytes or SHARD_BYTES
    number = math.ceil(size / most)
    if number > MAX_SHARDS:
        raise InvalidRequest(
            f"{size} bytes in shards of {most} would be {number}, at most {MAX_SHARDS} are possible",
            param="shard_bytes",
        )
    return number


def _refuse_other_shards(space: Workspace, shards: int) -> None:
    """Shards that another number of them was begun with are made anew; the keys stay. What killed workers left goes."""
    for draft in space.folder.glob(".shard-*"):
        discard(draft)
    file = space.folder / BUILD_FOLDER / "shards"
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
