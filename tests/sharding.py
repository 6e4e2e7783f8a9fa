"""Versions of shards, made of versions in one folder."""

from pathlib import Path

from knnlm.datastore.files import write_atomic
from knnlm.datastore.layout import TOKENIZER, FileRecord, shard_name
from knnlm.datastore.manifest import IndexRecord
from knnlm.datastore.reader import Datastore
from knnlm.datastore.shards import plan_shards, sharded_manifest, write_shard
from knnlm.index.build import build_index


def sharded(path: Path, shards: int, *, version: str = "sharded", recipe: str | None = None) -> Path:
    """The version in folder `path`, which never grew, as one of `shards` shards beside it. recipe: of its index, by
    default the same. Returns its folder; it is not activated."""
    store = Datastore.open(path)
    old, target = store.manifest, path.with_name(version)
    tokenizer = (path / TOKENIZER).read_text(encoding="utf-8")
    fields = {n: getattr(old, n) for n in ("domain", "model", "key_function", "windows", "key_dim", "key_dtype")}
    rows = [row for _, row in store.live_rows()]
    made = []
    for plan in plan_shards(rows, shards, old.entries):
        texts = [(row, store.tokens[row.start : row.start + row.tokens]) for row in rows[slice(*plan.documents)]]
        keys = [store.keys[slice(*plan.entries)]]
        folder = target / shard_name(plan.number)
        made.append(write_shard(folder, plan, texts, keys, tokenizer, {**fields, "version": version}))
    write_atomic(target / TOKENIZER, tokenizer.encode())
    manifest = sharded_manifest(made, IndexRecord(recipe="flat"), {TOKENIZER: FileRecord.of(target / TOKENIZER)})
    manifest.model_copy(update={"tuning": old.tuning}).save(target)
    if (recipe or old.index.recipe) != "flat":
        build_index(target, recipe or old.index.recipe)
    return target
