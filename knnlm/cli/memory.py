"""`knnlm memory`: models that learn what retrieval would answer: their targets, their training, their folders."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli.common import (
    DEFAULT_STORE,
    DeviceOption,
    DomainArgument,
    DtypeOption,
    JsonOption,
    ModelOption,
    PartOption,
    SourcesArgument,
    StoreOption,
    VersionOption,
    parse_part,
    print_json,
    print_table,
    progress,
    remark,
    version_folder,
)
from knnlm.errors import InvalidRequest

if TYPE_CHECKING:
    from knnlm.lm.distillation import Tried
    from knnlm.memory.manifest import MemoryManifest, TargetsManifest

memory = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Train memories, small models that have learnt what retrieval from a domain would answer.",
)

MEMORIES = Path("memories")
MIN_KEPT = 0.98  # mean mass: with less, what a memory learns is sharper than what retrieval answers


@memory.command("targets")
def targets(
    domain: DomainArgument,
    model: ModelOption,
    store: StoreOption = DEFAULT_STORE,
    version: VersionOption = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; by default memories/DOMAIN-VERSION.targets.")
    ] = None,
    exclude: Annotated[
        str,
        typer.Option(help="What is no neighbor of an entry: itself alone (entry) or all of its document (document)."),
    ] = "entry",
    k: Annotated[
        list[int] | None, typer.Option("--k", help="Neighbors to try; may be repeated. Default: 64, 256 and 1024.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Take this temperature, with one --k; by default both are fitted.")
    ] = None,
    top: Annotated[int, typer.Option(help="Tokens kept of each distribution.")] = 128,
    max_tokens: Annotated[
        int, typer.Option(help="Fit on a sample of this many tokens of the domain's own text.")
    ] = 20_000,
    max_entries: Annotated[
        int | None,
        typer.Option(help="Take random documents until they have this many entries; default: all."),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write what retrieval answers for every entry of a domain: what memories learn. Stopped runs continue."""
    from knnlm.datastore.catalog import Catalog
    from knnlm.evaluation.memory_targets import KS, build_targets

    name = version_folder(Catalog(store), domain, version).name
    folder = out or MEMORIES / f"{domain}-{name}.targets"
    with progress("entries", None, description="targets") as update:
        try:
            made = build_targets(
                store, domain, model, folder, version=name, exclude=exclude, ks=k or KS, temperature=temperature,
                top=top, max_tokens=max_tokens, max_entries=max_entries, device=device, dtype=dtype,
                on_progress=lambda what, done, total: update(done, what, total),
            )  # fmt: skip
        except KeyboardInterrupt:
            remark("stopped: the same command continues where it was")
            raise
    if made.fit is not None and made.too_sharp:
        helps = ": try --exclude document" if made.settings.exclude == "entry" else ", in other documents"
        remark(
            f"warning: entries find what new text would not: the likeliest token has {made.shape.largest:.2f} on "
            f"average, on a sample without its own documents {made.fit.shape.largest:.2f}{helps}"
        )
    if made.fit is not None and made.fit.lmbda == 0:
        remark("warning: retrieval does not help on a sample of this text, so there is little for a memory to learn")
    if made.rows and made.kept < MIN_KEPT:
        remark(
            f"warning: what is left out of the distributions is {1 - made.kept:.1%} of their mass: try a larger --top"
        )
    _print_targets(folder, made, None, as_json=as_json)


@memory.command("train")
def train(
    domain: DomainArgument,
    sources: SourcesArgument,
    model: ModelOption,
    store: StoreOption = DEFAULT_STORE,
    version: VersionOption = None,
    part: PartOption = "all",
    out: Annotated[Path | None, typer.Option(help="The folder to write; by default memories/DOMAIN.")] = None,
    targets: Annotated[
        Path | None,
        typer.Option(help="A folder of `knnlm memory targets`; by default the one it writes for this version."),
    ] = None,
    kind: Annotated[
        str, typer.Option(help="decoder, a model that reads the tokens; mlp, a net that reads the LM's keys.")
    ] = "decoder",
    init: Annotated[
        str | None,
        typer.Option(help="Start from this model instead of the LM, or from a config.json with random weights."),
    ] = None,
    beta: Annotated[
        float, typer.Option(help="Weight of what retrieval answers, beside the text itself; 0 needs no targets.")
    ] = 0.5,
    epochs: Annotated[float, typer.Option(help="How often every entry is learnt.")] = 5.0,
    batch_entries: Annotated[int, typer.Option(help="Entries of one step.")] = 8192,
    pass_tokens: Annotated[int, typer.Option(help="Tokens in the memory at once; a step takes several passes.")] = 8192,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    warmup_steps: Annotated[int, typer.Option(help="Steps over which it rises; it then falls to zero.")] = 100,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of matrices.")] = 0.0,
    evaluations: Annotated[int, typer.Option(help="How often the mixture is tried on SOURCES; the best is kept.")] = 20,
    hidden: Annotated[
        int | None, typer.Option(help="Width of each layer of an mlp; default: 5 % of the store's bytes, at most 512.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of an mlp; default: 2.")] = None,
    bottleneck: Annotated[
        int | None,
        typer.Option(help="Width of an mlp before the vocabulary; default: a quarter of --hidden's default."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Try the mixture on a sample of this many tokens of SOURCES.")
    ] = 20_000,
    seed: Annotated[int, typer.Option(help="Seed of weights and order.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train a memory of a domain on its targets. Stopped runs continue with the same command.

    SOURCES are documents that the domain does not hold: the weights kept are those that help the LM most on them.
    """
    from knnlm.datastore.catalog import Catalog
    from knnlm.datastore.manifest import Manifest
    from knnlm.datastore.text import read_documents
    from knnlm.evaluation.memory_training import MlpSizes, check_kind, train_memory
    from knnlm.evaluation.splits import select
    from knnlm.lm.distillation import DistilSettings
    from knnlm.memory.targets import Targets

    path = version_folder(Catalog(store), domain, version)
    check_kind(kind)
    if not 0 < epochs < math.inf:
        raise InvalidRequest(f"epochs must be > 0, got {epochs}", param="epochs")
    for name, value in (("evaluations", evaluations), ("batch_entries", batch_entries)):
        if value < 1:
            raise InvalidRequest(f"{name} must be at least 1, got {value}", param=name)
    settings = DistilSettings(  # refused before anything is read
        steps=1, beta=beta, batch_entries=batch_entries, pass_tokens=pass_tokens, learning_rate=learning_rate,
        warmup_steps=warmup_steps, weight_decay=weight_decay, evaluate_steps=1, seed=seed,
    )  # fmt: skip
    manifest = Manifest.load(path)
    folder = out or MEMORIES / domain
    taught = targets or (MEMORIES / f"{domain}-{path.name}.targets" if beta else None)
    entries = manifest.live_entries if taught is None else Targets.open(taught).manifest.entries
    steps = math.ceil(epochs * entries / batch_entries)
    warmup_steps, tried = min(warmup_steps, steps // 4), math.ceil(steps / evaluations)
    settings = replace(settings, steps=steps, warmup_steps=warmup_steps, evaluate_steps=tried)
    chosen = list(select(read_documents(sources), parse_part(part)))
    named = {n: v for n, v in (("hidden", hidden), ("layers", layers), ("bottleneck", bottleneck)) if v is not None}
    sizes = replace(MlpSizes.fitting(manifest), **named) if named else None
    with progress("entries", steps * batch_entries, description="training") as update:
        shown = ""

        def on_step(step: int, loss: float, excess: float, found: "Tried | None") -> None:
            nonlocal shown
            if found is not None:
                shown = f", with the LM {found.mixture_loss:.4f} at {found.lmbda:.2f}"
            update(step * batch_entries, f"loss {loss:.3f}, {excess:.3f} above its floor{shown}")

        try:
            made = train_memory(
                store, domain, chosen, model, folder, settings, kind=kind, targets=taught, version=path.name,
                start=init, sizes=sizes, max_tokens=max_tokens, device=device, dtype=dtype, on_step=on_step,
            )  # fmt: skip
        except KeyboardInterrupt:
            remark("stopped: the same command continues from the last saved state")
            raise
    _print_memory(folder, made, None, as_json=as_json)
    if made.tune.lmbda == 0:
        remark("warning: the memory does not help on these documents: its weight is 0")


@memory.command("show")
def show(
    folder: Annotated[Path, typer.Argument(help="The folder of a memory, or of targets.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Show what a memory was made of, what it gains, and whether its domain has moved on since; or targets."""
    from knnlm.datastore.catalog import Catalog
    from knnlm.memory.manifest import TARGETS, MemoryManifest
    from knnlm.memory.targets import Targets

    made: MemoryManifest | TargetsManifest
    made = Targets.open(folder).manifest if (folder / TARGETS).exists() else MemoryManifest.open(folder)
    stale = made.store.stale(Catalog(store))
    if isinstance(made, MemoryManifest):
        _print_memory(folder, made, stale, as_json=as_json)
    else:
        _print_targets(folder, made, stale, as_json=as_json)
    if stale is not None:
        remark(f"warning: {stale}")


@memory.command("verify")
def verify(
    folder: Annotated[Path, typer.Argument(help="The folder of a memory, or of targets.")],
    as_json: JsonOption = False,
) -> None:
    """Read every byte of a memory, or of targets, and compare it with its manifest. Exit code 1 when it is damaged."""
    from knnlm.memory.manifest import TARGETS, MemoryManifest
    from knnlm.memory.targets import Targets

    if (folder / TARGETS).exists():
        files, what = Targets.open(folder, check="all").manifest.files, "targets"
    else:
        files, what = MemoryManifest.open(folder, check="all").files, "memory"
    if as_json:
        print_json({"path": str(folder), "what": what, "files": sorted(files)})
        return
    print(
        f"{folder}: {what}, {len(files)} files of {sum(f.bytes for f in files.values()):,} bytes, as they were written"
    )


def _print_memory(folder: Path, made: "MemoryManifest", stale: str | None, *, as_json: bool) -> None:
    if as_json:
        print_json({"path": str(folder), "stale": stale, **made.model_dump(mode="json")})
        return
    tune, source = made.tune, made.store
    taught = "the text alone"
    if made.targets is not None:
        s = made.targets.settings
        taught = f"p_kNN (k {s.k}, temperature {s.temperature:.5g}, without its own {s.exclude}) and the text"
    perplexities = [f"{math.exp(loss):.3f}" for loss in (tune.lm_loss, tune.memory_loss, tune.mixture_loss)]
    size = sum(f.bytes for f in made.files.values())
    rows = [
        ("kind", f"{made.kind}, {made.parameters:,} parameters, {size:,} bytes"),
        (
            "learnt from",
            f"{source.domain} {source.version}: {source.entries:,} entries of {source.documents:,} documents",
        ),
        ("learnt", f"{taught}, beta {made.beta:g}, {tune.step:,} of {made.training['steps']:,} steps"),
        ("model", f"{made.model.model_id}, keys {made.key_function}, tokenizer {made.model.tokenizer_sha256[:12]}"),
        ("started as", made.start.model_id or "random weights"),
        ("loss", f"{made.train_loss:.4f} in training, {made.excess:.4f} above its floor"),
        ("perplexity", "LM {}, memory {}, both {}".format(*perplexities) + f" at weight {tune.lmbda:.2f}"),
        ("tried on", f"{tune.tokens:,} tokens of {tune.documents:,} documents that are not in the store"),
        ("created", made.created.isoformat(timespec="seconds")),
    ]
    print_table(["memory", str(folder)], rows, left=(0, 1))


def _print_targets(folder: Path, made: "TargetsManifest", stale: str | None, *, as_json: bool) -> None:
    if as_json:
        print_json({"path": str(folder), "stale": stale, **made.model_dump(mode="json")})
        return
    settings, shape = made.settings, made.shape
    print(f"{folder}: {made.rows:,} distributions of {made.masses:,} tokens, {made.empty:,} entries without a neighbor")
    print(
        f"k {settings.k}, temperature {settings.temperature:.5g}, excluded: {settings.exclude}, index {settings.index}"
    )
    print(
        f"means: entropy {shape.entropy:.3f} nats, likeliest token {shape.largest:.3f}, {shape.support:.1f} tokens, of "
        f"which the {settings.top} likeliest kept hold {made.kept:.4f}; of the token that came {shape.of_value:.3f}"
    )
