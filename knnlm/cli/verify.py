"""`knnlm verify`: whether a datastore on disk is what was written."""

from typing import Annotated

import typer

from knnlm.cli.common import DEFAULT_STORE, JsonOption, StoreOption, VersionOption, print_json, version_folder
from knnlm.errors import DatastoreCorrupt, InvalidRequest


def verify(
    domain: Annotated[
        str | None, typer.Argument(help="The domain; its current version unless --version is given.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    version: VersionOption = None,
    everything: Annotated[bool, typer.Option("--all", help="Every version of every domain instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Read every byte of a datastore and compare it with its manifest. Exit code 1 when one is damaged."""
    from knnlm.datastore.catalog import Catalog
    from knnlm.index.verify import verify as run

    if everything == (domain is not None) or (everything and version is not None):
        raise InvalidRequest("expected either a domain or --all", param="domain")
    catalog = Catalog(store)
    if domain is not None:
        paths = [version_folder(catalog, domain, version)]
    else:
        paths = [catalog.path(d, v) for d in catalog.domains() for v in catalog.versions(d)]
    results = []
    for path in paths:
        problems, remarks = [], []
        for check in run(path):
            if check.problem is not None:
                problems.append(f"{check.name} {check.problem}")
            elif check.remark is not None:
                remarks.append(f"{check.name}; {check.remark}")
            if not as_json:
                found = check.problem or "; ".join(["ok", *([check.remark] if check.remark else [])])
                print(f"{path.parent.name} {path.name}  {check.name}  {found}")
        results.append({"domain": path.parent.name, "version": path.name, "problems": problems, "remarks": remarks})
    if as_json:
        print_json(results)
    elif not results:
        print(f"no domains in {store}")
    damaged = [f"{r['domain']} {r['version']}" for r in results if r["problems"]]
    if damaged:
        raise DatastoreCorrupt(f"{', '.join(damaged)} cannot be relied on: see what was found")
