"""`knnlm index`: the search structures over the keys of a datastore, built, chosen, removed and compared."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli.common import (
    DEFAULT_STORE,
    DeviceOption,
    DomainArgument,
    DtypeOption,
    JsonOption,
    MinContextOption,
    PartOption,
    StoreOption,
    VersionOption,
    parse_part,
    print_json,
    print_table,
    progress,
    remark,
    version_folder,
)
from knnlm.errors import InvalidRequest, KnnlmError

if TYPE_CHECKING:
    from knnlm.datastore.manifest import Manifest
    from knnlm.evaluation.index_report import IndexReport

RecipeArgument = Annotated[str, typer.Argument(help="The recipe of an index that the version has, or flat.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the training sample.")]

index = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Build, choose, remove and compare the indexes of a datastore."
)


@index.command("build")
def build(
    domain: DomainArgument,
    store: StoreOption = DEFAULT_STORE,
    version: VersionOption = None,
    recipe: Annotated[
        str,
        typer.Option(help="auto, or a recipe: flat, ivf1024,pq64x4fs, hnsw32,sq8, pcar64,ivf1024,pq32x4fs, ..."),
    ] = "auto",
    beside: Annotated[bool, typer.Option("--beside", help="Keep the default index, and add this one to it.")] = False,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Build the index of a datastore anew from its keys. Another recipe needs tuning again.

    Documents that were added since it was built stay beside the index, until `knnlm compact`.
    """
    from knnlm.datastore.catalog import Catalog
    from knnlm.datastore.manifest import Manifest
    from knnlm.index.build import index_remark

    path = version_folder(Catalog(store), domain, version)
    before = Manifest.load(path)
    made, reasons = make_index(path, recipe, seed=seed, beside=beside)
    unusual = index_remark(path, made)
    if unusual is not None:
        remark(unusual)
    _tell(before, path, made, reasons, as_json=as_json)


@index.command("use")
def use(
    domain: DomainArgument,
    recipe: RecipeArgument,
    store: StoreOption = DEFAULT_STORE,
    version: VersionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an index that a version has the one that answers. Running services take it up."""
    from knnlm.datastore.updates.revise import with_default_index

    _revise(with_default_index, "the default now, as asked", domain, recipe, store, version, as_json=as_json)


@index.command("remove")
def remove(
    domain: DomainArgument,
    recipe: RecipeArgument,
    store: StoreOption = DEFAULT_STORE,
    version: VersionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove an index and its file from a version. The one that answers is refused."""
    from knnlm.index.build import remove_index

    _revise(remove_index, "removed, as asked", domain, recipe, store, version, as_json=as_json)


@index.command("report")
def report(
    domain: DomainArgument,
    sources: Annotated[list[str], typer.Argument(help="Text that is not in the datastore, to ask for.")],
    model: Annotated[str, typer.Option("--model", envvar="KNNLM_MODEL", help="The model that made the keys.")],
    store: StoreOption = DEFAULT_STORE,
    version: VersionOption = None,
    recipes: Annotated[
        str | None, typer.Option(help="What to compare, separated by spaces; by default one of every family.")
    ] = None,
    queries: Annotated[int, typer.Option(help="Tokens to ask for.")] = 4096,
    part: PartOption = "all",
    min_context: MinContextOption = None,
    page: Annotated[Path | None, typer.Option(help="Also write it as an HTML page.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Keep indexes and results in this folder, for the next report.")
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Compare indexes of a datastore by speed, memory and perplexity. Its own stays what it is."""
    from knnlm.datastore.catalog import Catalog
    from knnlm.datastore.manifest import Manifest
    from knnlm.datastore.text import read_documents
    from knnlm.evaluation.collect import observe
    from knnlm.evaluation.index_candidates import candidates, default_candidates
    from knnlm.evaluation.index_page import write_index_page
    from knnlm.evaluation.index_report import index_report, refuse_shards
    from knnlm.evaluation.splits import encode, sample, select, unseen
    from knnlm.index.searcher import Searcher
    from knnlm.lm.model import LanguageModel

    path = version_folder(Catalog(store), domain, version)
    if queries < 1:
        raise InvalidRequest(f"queries must be >= 1, got {queries}", param="queries")
    refuse_shards(path)
    manifest = Manifest.load(path)
    size = (manifest.base_entries, manifest.key_dim)
    chosen = default_candidates(*size) if recipes is None else candidates(recipes.split(), *size)
    documents = list(select(read_documents(sources), parse_part(part)))
    lm = LanguageModel.load(model, device=device, dtype=dtype, key_function=manifest.key_function)
    opened = Searcher.open(path, index="flat", expect=lm.info)  # another model's keys are no queries here
    info = opened.info(())
    opened.close()
    held_out = unseen(encode(documents, lm.tokenizer), path)
    if not held_out:
        raise InvalidRequest(f"no document to ask for that is not in {path}", param="sources")
    few = sample(held_out, lm.tokenizer, queries)
    with progress("tokens", sum(len(d.tokens) - 1 for d in few), description="queries") as update:
        observed = observe(lm, few, domains=[info], min_context=min_context, on_progress=lambda done: update(done))
    folder = path.with_name(f".{path.name}.report") if work is None else work
    try:
        with progress("steps", None, description="comparing") as update:
            found = index_report(
                path,
                observed,
                chosen,
                folder,
                seed=seed,
                on_progress=lambda what, done, total: update(done, what, total),
            )
    except (KnnlmError, KeyboardInterrupt):
        remark(f"what was finished is in {folder}: the same command goes on from there")
        raise
    if work is None:
        shutil.rmtree(folder)
    if page is not None:
        write_index_page(page, found)
    if as_json:
        print_json(found.as_json())
    else:
        print_report(found)


def _revise(
    change: Callable[[Path, str], object], done: str, domain: str, recipe: str, store: Path, version: str | None, *,
    as_json: bool,
) -> None:  # fmt: skip
    """Change the indexes of a version, and say what was done."""
    from knnlm.datastore.catalog import Catalog
    from knnlm.datastore.manifest import Manifest

    path = version_folder(Catalog(store), domain, version)
    before = Manifest.load(path)
    change(path, recipe)
    _tell(before, path, recipe, [done], as_json=as_json)


def _tell(before: "Manifest", path: Path, recipe: str, reasons: Sequence[str], *, as_json: bool) -> None:
    """What became of the index `recipe`, and which indexes the version has now."""
    from knnlm.datastore.manifest import Manifest

    after = Manifest.load(path)
    if before.tuning is not None and before.index.recipe != after.index.recipe:
        remark(
            f"the tuning was fitted to neighbors found by {before.index.recipe}: run `knnlm tune {after.domain}` again"
        )
    indexes = [each.recipe for each in after.indexes]
    if as_json:
        said = {"domain": after.domain, "version": path.name, "index": recipe, "reasons": reasons, "indexes": indexes}
        print_json(said)
        return
    print_index(f"index {recipe} of {after.domain} {path.name}", reasons)
    if len(indexes) > 1:
        print(f"{indexes[0]} answers, {', '.join(indexes[1:])} beside it")


def print_index(what: str, reasons: Sequence[str]) -> None:
    """A reason beside what it is about, several below each other."""
    if len(reasons) == 1:
        print(f"{what}: {reasons[0]}")
        return
    print(what)
    for reason in reasons:
        print(f"  {reason}")


def make_index(path: Path, recipe: str, *, seed: int = 0, beside: bool = False) -> tuple[str, list[str]]:
    """Build it, and return (the recipe, why this one: a sentence each)."""
    from knnlm.index.build import build_index, suited
    from knnlm.index.memory import available_bytes

    choice = suited(path, recipe, memory_bytes=available_bytes())
    with progress("keys", None, description=f"index {choice.recipe}") as update:

        def on_progress(done: int, total: int) -> None:
            update(done, f"index {choice.recipe}" + ("" if done else ", training"), total)

        build_index(path, choice.recipe, seed=seed, beside=beside, on_progress=on_progress)
    return choice.recipe, list(choice.reasons)


def print_report(found: "IndexReport") -> None:
    """Two tables: what the answers are worth, and how fast they come."""
    columns = ["index", "bytes/key", "stored bytes/key", "build s", *(f"recall@{k}" for k in found.ks)]
    rows = []
    for line in found.lines:
        quality = line.quality
        recalls = [f"{quality.recalls[k]:.4f}" for k in found.ks]
        numbers = [f"{line.bytes_per_key:.1f}", str(line.stored_bytes_per_key), f"{line.build_seconds:.1f}", *recalls]
        rows.append([line.name, *numbers, f"{quality.total_variation:.4f}", f"{quality.perplexity:.4f}"])
    print_table([*columns, "total variation", "perplexity"], rows)
    cells = [(batch, k) for k in found.ks for batch in found.batches]
    print("\nqueries per second, by batch and k:")
    speeds = [[line.name, *(f"{line.speeds[cell]:,.0f}" for cell in cells)] for line in found.lines]
    print_table(["index", *(f"{batch}, {k}" for batch, k in cells)], speeds)
    print(
        f"\n{found.domain} {found.version}: {found.entries:,} entries; {found.queries:,} tokens of {found.documents:,} "
        f"documents; perplexity {found.lm_perplexity:.4f} of the LM alone, {found.exact.perplexity:.4f} with exact "
        f"search at temperature {found.exact.temperature:.5g}, lambda {found.exact.lmbda:.3f}"
    )
