"""`knnlm index`: the search structure over the keys of a datastore."""

from collections.abc import Sequence
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
    print_json,
    progress,
    remark,
    version_folder,
)
from knnlm.cli.index_report import report as compare
from knnlm.errors import InvalidRequest

if TYPE_CHECKING:
    from knnlm.datastore.manifest import Manifest

AUTO = "auto"
RecipeOption = Annotated[
    str | None,
    typer.Option(help="auto (the default), or a recipe: flat, ivf1024,pq64x4fs, hnsw32,sq8, pca64,ivf1024,sq8, ..."),
]
QUERIES = 4096


def index(
    domain: DomainArgument,
    sources: Annotated[list[str] | None, typer.Argument(help="With --report: text that is not in it.")] = None,
    store: StoreOption = DEFAULT_STORE,
    version: VersionOption = None,
    recipe: RecipeOption = None,
    beside: Annotated[bool, typer.Option("--beside", help="Keep the default index, and add this one to it.")] = False,
    use: Annotated[str | None, typer.Option(help="Build nothing: make this index the default one.")] = None,
    remove: Annotated[str | None, typer.Option(help="Build nothing: remove this index and its file.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the training sample.")] = 0,
    report: Annotated[
        bool, typer.Option("--report", help="Build nothing to stay: compare indexes, on queries from SOURCES.")
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", envvar="KNNLM_MODEL", help="With --report: the model that made the keys.")
    ] = None,
    recipes: Annotated[
        str | None,
        typer.Option(help="With --report: what to compare, separated by spaces; by default one of every family."),
    ] = None,
    queries: Annotated[int | None, typer.Option(help="With --report: tokens to ask for; by default 4096.")] = None,
    part: PartOption = "all",
    min_context: MinContextOption = None,
    page: Annotated[Path | None, typer.Option(help="With --report: also write it as an HTML page.")] = None,
    work: Annotated[
        Path | None,
        typer.Option(help="With --report: keep indexes and results in this folder, for the next report."),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Build the index of a datastore anew from its keys, or compare indexes. Another recipe needs tuning again.

    Documents that were added since it was built stay beside the index, until `knnlm compact`.
    """
    from knnlm.datastore.catalog import Catalog
    from knnlm.datastore.manifest import Manifest

    path = version_folder(Catalog(store), domain, version)
    if report:
        if use is not None or remove is not None or beside:
            raise InvalidRequest("--beside, --use and --remove mean nothing with --report", param="--report")
        if recipe is not None:
            raise InvalidRequest("--recipe is what to build; with --report it is --recipes", param="recipe")
        if not sources or model is None:
            raise InvalidRequest("--report needs SOURCES and --model, for its queries", param="sources")
        compare(
            path,
            sources,
            model,
            part=part,
            recipes=recipes,
            queries=QUERIES if queries is None else queries,
            min_context=min_context,
            page=page,
            work=work,
            seed=seed,
            device=device,
            dtype=dtype,
            as_json=as_json,
        )
        return
    unused = {
        "SOURCES": bool(sources), "--recipes": recipes is not None, "--queries": queries is not None,
        "--page": page is not None, "--work": work is not None, "--min-context": min_context is not None,
        "--part": part != "all", "--device": device != "auto", "--dtype": dtype != "auto",
    }  # fmt: skip
    for name, is_given in unused.items():
        if is_given:
            raise InvalidRequest(f"{name} means nothing without --report", param=name)
    before = Manifest.load(path)
    after, made, reasons = _change(path, recipe, beside=beside, use=use, remove=remove, seed=seed)
    if before.tuning is not None and before.index.recipe != after.index.recipe:
        remark(f"the tuning was fitted to neighbors found by {before.index.recipe}: run `knnlm tune {domain}` again")
    indexes = [index.recipe for index in after.indexes]
    if as_json:
        print_json({"domain": domain, "version": path.name, "index": made, "reasons": reasons, "indexes": indexes})
        return
    print_index(f"index {made} of {domain} {path.name}", reasons)
    if len(indexes) > 1:
        print(f"{indexes[0]} answers, {', '.join(indexes[1:])} beside it")


def _change(
    path: Path, recipe: str | None, *, beside: bool, use: str | None, remove: str | None, seed: int
) -> tuple["Manifest", str, list[str]]:
    """What was asked for. Returns (the version after it, the index it was about, why or what)."""
    from knnlm.datastore.manifest import Manifest
    from knnlm.datastore.updates.revise import with_default_index
    from knnlm.index.build import remove_index

    given = {
        "--use": use is not None,
        "--remove": remove is not None,
        "--recipe": recipe is not None,
        "--beside": beside,
    }
    named = [name for name, is_given in given.items() if is_given]
    if (use is not None or remove is not None) and len(named) > 1:
        raise InvalidRequest(f"{named[0]} builds nothing, so {named[1]} means nothing with it", param=named[1])
    if use is not None:
        return with_default_index(path, use), use, ["the default now, as asked"]
    if remove is not None:
        remove_index(path, remove)
        return Manifest.load(path), remove, ["removed, as asked"]
    made, reasons = make_index(path, recipe or AUTO, seed=seed, beside=beside)
    return Manifest.load(path), made, reasons


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
