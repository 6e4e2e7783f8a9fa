"""`knnlm domains`: what is in the store, which version answers, and removing the others."""

from dataclasses import dataclass
from typing import Annotated

import typer

from knnlm.cli.common import DEFAULT_STORE, DomainArgument, JsonOption, StoreOption, print_json, print_table

domains = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="List, activate and remove versions of domains."
)

OneVersion = Annotated[str, typer.Argument(help="The version, such as v3.")]


@dataclass(frozen=True)
class Row:
    domain: str
    version: str
    current: bool
    entries: int
    documents: int
    index: str
    indexes: tuple[str, ...]
    model_id: str
    tuned: bool


@domains.command("list")
def list_domains(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """List every version of every domain."""
    from dataclasses import asdict

    from knnlm.datastore.catalog import Catalog
    from knnlm.datastore.manifest import Manifest

    catalog = Catalog(store)
    rows = []
    for domain in catalog.domains():
        current = catalog.current(domain)
        for version in catalog.versions(domain):
            m = Manifest.load(catalog.path(domain, version))
            rows.append(
                Row(domain, version, version == current, m.entries, m.documents, m.index.recipe,
                    tuple(index.recipe for index in m.indexes), m.model.model_id, m.tuning is not None)
            )  # fmt: skip
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    if not rows:
        print(f"no domains in {store}")
        return
    print_table(
        ["domain", "version", "entries", "documents", "index", "model", ""],
        [
            [r.domain, r.version, f"{r.entries:,}", f"{r.documents:,}", "; ".join(r.indexes), r.model_id,
             ", ".join(["current"] * r.current + ["tuned"] * r.tuned)]
            for r in rows
        ],
        left=(0, 1, 4, 5, 6),
    )  # fmt: skip


@domains.command()
def activate(
    domain: DomainArgument, version: OneVersion, store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False
) -> None:
    """Make a version the current one. Running services switch to it; rolling back is the same command."""
    from knnlm.datastore.catalog import Catalog

    catalog = Catalog(store)
    before = catalog.current(domain)
    catalog.activate(domain, version)
    if as_json:
        print_json({"domain": domain, "version": version, "previous": before})
    else:
        print(f"{domain} is now {version}" + (f" (was {before})" if before else ""))


@domains.command()
def remove(
    domain: DomainArgument, version: OneVersion, store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False
) -> None:
    """Delete a version for good. The current one is refused."""
    from knnlm.datastore.catalog import Catalog

    Catalog(store).remove(domain, version)
    if as_json:
        print_json({"domain": domain, "version": version, "removed": True})
    else:
        print(f"removed {domain} {version}")
