"""`knnlm memory`: models that learn what retrieval would answer: their targets, their training, their folders."""

from pathlib import Path
from typing import Annotated

import typer

from knnlm.cli.common import (
    DEFAULT_STORE,
    DeviceOption,
    DomainArgument,
    DtypeOption,
    JsonOption,
    ModelOption,
    StoreOption,
    VersionOption,
    print_json,
    progress,
    remark,
    version_folder,
)

memory = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Train memories, small models that have learnt what retrieval from a domain would answer.",
)

MEMORIES = Path("memories")


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
    top: Annotated[int, typer.Option(help="Tokens kept of each distribution.")] = 32,
    max_tokens: Annotated[
        int, typer.Option(help="Fit on a sample of this many tokens of the domain's own text.")
    ] = 20_000,
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
                top=top, max_tokens=max_tokens, device=device, dtype=dtype,
                on_progress=lambda what, done, total: update(done, what, total),
            )  # fmt: skip
        except KeyboardInterrupt:
            remark("stopped: the same command continues where it was")
            raise
    if made.fit is not None and made.too_sharp:
        remark(
            "warning: entries find the rest of their own documents, which new text does not: the likeliest token has "
            f"{made.shape.largest:.2f} on average, without them {made.fit.shape.largest:.2f}: try --exclude document"
        )
    if made.fit is not None and made.fit.lmbda == 0:
        remark("warning: retrieval does not help on a sample of this text, so there is little for a memory to learn")
    if as_json:
        print_json({"path": str(folder), **made.model_dump(mode="json")})
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
