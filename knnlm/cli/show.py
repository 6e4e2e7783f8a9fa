"""`knnlm show`: what a datastore is, and what its entries are."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knnlm.cli.common import (
    DEFAULT_STORE,
    DomainArgument,
    JsonOption,
    StoreOption,
    VersionOption,
    print_json,
    print_table,
    version_folder,
)
from knnlm.cli.retrieval import weight_of
from knnlm.errors import InvalidRequest

if TYPE_CHECKING:
    from knnlm.datastore.manifest import IndexRecord, Manifest
    from knnlm.datastore.reader import Datastore
    from knnlm.tokenizer import Tokenizer


def show(
    domain: DomainArgument,
    store: StoreOption = DEFAULT_STORE,
    version: VersionOption = None,
    entry: Annotated[list[int] | None, typer.Option("--entry", help="Show this entry too; may be repeated.")] = None,
    around: Annotated[int, typer.Option(help="Tokens to show on either side of an entry.")] = 24,
    as_json: JsonOption = False,
) -> None:
    """Show the manifest of a datastore and, with --entry, entries with their text and document."""
    from knnlm.datastore.catalog import Catalog
    from knnlm.datastore.layout import TOKENIZER
    from knnlm.datastore.reader import Datastore
    from knnlm.tokenizer import Tokenizer

    if around < 1:
        raise InvalidRequest(f"--around must be at least 1, got {around}", param="--around")
    path = version_folder(Catalog(store), domain, version)
    datastore = Datastore.open(path)
    try:
        tokenizer = Tokenizer((path / TOKENIZER).read_text(encoding="utf-8"), bos_token_id=None, eos_token_id=None)
        entries = [_entry(datastore, tokenizer, number, around) for number in entry or ()]
        memory = {index.recipe: _memory(index, datastore) for index in datastore.manifest.indexes}
        added, size = _added(datastore), _size(datastore)
    finally:
        datastore.close()
    if as_json:
        print_json(
            {**datastore.manifest.model_dump(mode="json"), "memory": memory, "added_memory": added, "shown": entries}
        )
        return
    print_table(["domain", domain], _summary(datastore.manifest, memory, added, size), left=(0, 1))
    for e in entries:
        print(f"\nentry {e['entry']}: token {e['position']} of {e['document']}")
        print(f"{e['before']!r} → {e['after']!r}")


def _entry(datastore: "Datastore", tokenizer: "Tokenizer", number: int, around: int) -> dict[str, Any]:  # Any: JSON
    passage = datastore.passage(number, around, around)
    before, after = tokenizer.passage(passage.before, passage.after, position=passage.position)
    return {
        "entry": number,
        "document": passage.document,
        "position": passage.position,
        "value": int(passage.after[0]),
        "token": tokenizer.token(int(passage.after[0])),
        "before": before,
        "after": after,
    }


def _memory(index: "IndexRecord", datastore: "Datastore") -> int | None:
    """Bytes that a process holds of an index to search it, of all shards; None for one that this program does not
    know."""
    from knnlm.datastore.manifest import Manifest
    from knnlm.datastore.shards import shard_folders
    from knnlm.index.table import family

    try:
        known = family(index.recipe)
    except InvalidRequest:
        return None
    total = 0
    keys = [part for _, part in datastore.parts_of_keys()] if datastore.manifest.shards else [datastore.keys]
    folders = list(shard_folders(datastore.path, datastore.manifest)) or [datastore.path]
    for folder, part in zip(folders, keys, strict=True):
        name = Manifest.load(folder).index_of(index.recipe).file
        total += known.resident_bytes(part, None if name is None else folder / name, resident=False)
    return total


def _added(datastore: "Datastore") -> int:
    """Bytes that a process holds of what was added to the version, beside its default index."""
    from knnlm.datastore.manifest import FLAT
    from knnlm.index.added import added_bytes
    from knnlm.index.table import family

    if datastore.manifest.shards:
        return 0
    try:
        known = family(datastore.manifest.index.recipe)
    except InvalidRequest:  # an index of a later program: counted as beside exact search
        known = family(FLAT)
    return added_bytes(datastore, known, resident=False)


def _growth(m: "Manifest", added: int) -> list[tuple[str, str]]:
    """Nothing of a version that has not grown."""
    rows = []
    if m.segments:
        entries, documents = m.entries - m.base_entries, m.documents - m.base_documents
        times = f"{len(m.segments)} time" + ("s" if len(m.segments) > 1 else "")
        rows.append(("added", f"{entries:,} of {documents:,} documents, {times}; {added:,} bytes in memory"))
    if m.removed is not None:
        rows.append(("removed", f"{m.removed.entries:,} of {m.removed.documents:,} documents"))
    return rows if m.parent is None else [*rows, ("grown from", m.parent)]


def _made_with(m: "Manifest") -> str:
    made = m.model
    if made.config_sha256 is None:
        return "a configuration and a dtype that were not recorded: whether another model's differ cannot be checked"
    return f"configuration {made.config_sha256[:12]}, {made.dtype}, BOS {made.bos_token_id}"


def _size(datastore: "Datastore") -> int:
    """Bytes of all files, those of shards included."""
    from knnlm.datastore.manifest import Manifest
    from knnlm.datastore.shards import shard_folders

    parts = [datastore.manifest, *(Manifest.load(f) for f in shard_folders(datastore.path, datastore.manifest))]
    return sum(file.bytes for part in parts for file in part.files.values())


def _shards(m: "Manifest") -> list[tuple[str, str]]:
    """Nothing of a version in one folder."""
    sizes = [shard.entries for shard in m.shards]
    return [("shards", f"{len(sizes)}, of {min(sizes):,} to {max(sizes):,} entries")] if sizes else []


def _summary(m: "Manifest", memory: Mapping[str, int | None], added: int, size: int) -> list[tuple[str, str]]:
    """(what, value) of everything that a person decides by. added: bytes in memory of what was added. size: of all
    files, in bytes."""
    tuned = "no: run `knnlm tune`"
    if m.tuning is not None:
        weight = weight_of(m.tuning.rule, m.tuning.parameters or {"lambda": m.tuning.lmbda})
        tuned = (
            f"temperature {m.tuning.temperature:.5g}, {weight}, k {m.tuning.k}; perplexity "
            f"{m.tuning.lm_perplexity:.3f} → {m.tuning.knn_perplexity:.3f} on {m.tuning.tokens:,} tokens"
        )
    return [
        ("version", m.version),
        ("created", m.created.isoformat(timespec="seconds")),
        ("entries", f"{m.live_entries:,} of {m.live_documents:,} documents"),
        *_shards(m),
        *_growth(m, added),
        ("keys", f"{m.key_function}, {m.key_dim} x {m.key_dtype}"),
        ("windows", f"{m.windows.context_length} tokens, at least {m.windows.min_context} of context"),
        ("model", f"{m.model.model_id} ({m.model.architecture}), weights {m.model.weights_sha256[:12]}"),
        ("made with", _made_with(m)),
        ("tokenizer", m.model.tokenizer_sha256[:12]),
        *[
            ("index" if i == 0 else "also indexed", recipe + ("" if held is None else f", {held:,} bytes in memory"))
            for i, (recipe, held) in enumerate(memory.items())
        ],
        ("bytes", f"{size:,}"),
        ("tuned", tuned),
    ]
