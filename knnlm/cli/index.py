"""`knnlm index`: the search structure over the keys of a datastore."""

from pathlib import Path
from typing import Annotated

import typer

from knnlm.cli.common import (
    DEFAULT_STORE,
    DomainArgument,
    JsonOption,
    StoreOption,
    VersionOption,
    print_json,
    progress,
    remark,
    version_folder,
)

AUTO = "auto"


def index(
    domain: DomainArgument,
    store: StoreOption = DEFAULT_STORE,
    version: VersionOption = None,
    recipe: Annotated[str, typer.Option(help="auto, flat, or lists and a codec, such as ivf1024,sq8.")] = AUTO,
    seed: Annotated[int, typer.Option(help="Seed of the training sample.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Build the index of a datastore anew from its keys. Another recipe needs tuning again."""
    from knnlm.datastore.catalog import Catalog
    from knnlm.datastore.manifest import Manifest

    path = version_folder(Catalog(store), domain, version)
    before = Manifest.load(path)
    made, reason = make_index(path, recipe, seed=seed)
    if before.tuning is not None and before.index.recipe != made:
        remark(f"the tuning was fitted to neighbors found by {before.index.recipe}: run `knnlm tune {domain}` again")
    if as_json:
        print_json({"domain": domain, "version": path.name, "index": made, "reason": reason})
    else:
        print(f"index {made} of {domain} {path.name}: {reason}")


def make_index(path: Path, recipe: str, *, seed: int = 0) -> tuple[str, str]:
    """Build it, and return (the recipe, why this one)."""
    from knnlm.datastore.manifest import Manifest
    from knnlm.index.build import build_index, choose

    reason = "as asked"
    if recipe == AUTO:
        manifest = Manifest.load(path)
        recipe, reason = choose(manifest.entries, manifest.key_dim)
    with progress("keys", None, description=f"index {recipe}") as update:
        made = build_index(path, recipe, seed=seed, on_progress=lambda done, total: update(done, total=total))
    return made, reason
