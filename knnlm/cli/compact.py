"""`knnlm compact`: what was added and removed folded into one base with one index."""

from typing import Annotated

import typer

from knnlm.cli.common import (
    DEFAULT_STORE,
    ActivateOption,
    DomainArgument,
    JsonOption,
    StoreOption,
    print_change,
    print_json,
    remark,
    showing,
    version_folder,
)


def compact(
    domain: DomainArgument,
    store: StoreOption = DEFAULT_STORE,
    index: Annotated[
        str | None,
        typer.Option(help="auto, or a recipe of `knnlm index`; by default that of the version's index."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for another change of the domain to end.")] = False,
    activate: ActivateOption = True,
    as_json: JsonOption = False,
) -> None:
    """Fold what was added and removed into a new version with one index, without the model."""
    from knnlm.datastore.catalog import Catalog
    from knnlm.datastore.manifest import Manifest
    from knnlm.index.compact import compact as run

    catalog = Catalog(store)
    try:
        with showing() as on_progress:
            change = run(
                catalog,
                domain,
                recipe=index,
                activate=catalog.activate if activate else None,
                wait=wait,
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        remark("stopped: the same command starts over; what was published already is not made again")
        raise
    if change.version == change.parent:
        if as_json:
            print_json({"domain": domain, "version": change.version, "parent": change.parent, "active": True})
        else:
            print(f"{domain} {change.version} has nothing to fold: no document was added or removed")
        return
    old = Manifest.load(version_folder(catalog, domain, change.parent))
    new = Manifest.load(catalog.path(domain, change.version))
    if new.tuning is not None and new.index.recipe != old.index.recipe:
        remark(f"the tuning was fitted to neighbors found by {old.index.recipe}: run `knnlm tune {domain}` again")
    for other in old.other_indexes:
        remark(f"{old.version} also has the index {other.recipe}: build it with `knnlm index build {domain} --recipe "
               f"{other.recipe} --beside`, if it is wanted")  # fmt: skip
    print_change(catalog, change, active=activate, as_json=as_json)
