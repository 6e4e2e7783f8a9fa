"""`knnlm domains`: what is in the store, which version answers, and removing the others."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli.common import DEFAULT_STORE, DomainArgument, JsonOption, StoreOption, print_json, print_table, progress
from knnlm.cli.remote import TlsCaOption, TlsCertOption, TlsKeyOption, api_key, is_given, refuse_without
from knnlm.errors import InvalidRequest

if TYPE_CHECKING:
    from knnlm.clients.rpc import DomainReplica, GrpcDatastore

domains = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="List, activate and remove versions of domains."
)

LOCAL = "127.0.0.1:9002"  # where a datastore service listens unless it is told otherwise
TARGET = "KNNLM_TARGET"

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
    from knnlm.datastore.catalog import Catalog
    from knnlm.datastore.manifest import Manifest

    catalog = Catalog(store)
    rows = []
    for domain in catalog.domains():
        current = catalog.current(domain)
        for version in catalog.versions(domain):
            m = Manifest.load(catalog.path(domain, version))
            rows.append(
                Row(domain, version, version == current, m.live_entries, m.live_documents, m.index.recipe,
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
    context: typer.Context,
    domain: DomainArgument,
    version: OneVersion,
    store: StoreOption = DEFAULT_STORE,
    target: Annotated[
        str | None,
        typer.Option(
            envvar=TARGET,
            help="Tell a running datastore service: host:port, dns:///host:port, or a comma list (gRPC).",
        ),
    ] = None,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait",
            help=f"Until every replica that serves the domain does so; without --target, those at {LOCAL}.",
        ),
    ] = False,
    timeout: Annotated[float, typer.Option(help="With --target: seconds it may take.")] = 300.0,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with an admin key of the datastore service; else KNNLM_API_KEY, if set.")
    ] = None,
    tls_ca_file: TlsCaOption = None,
    tls_cert_file: TlsCertOption = None,
    tls_key_file: TlsKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a version the current one. Running services switch to it; rolling back is the same command."""
    if wait and target is None:
        target = LOCAL
    if target is None:
        tls_files = ("tls_ca_file", "tls_cert_file", "tls_key_file")
        refuse_without("--target", context, "timeout", "api_key_file", *tls_files)
        _in_store(domain, version, store, as_json=as_json)
        return
    if is_given(context, "store"):
        raise InvalidRequest("expected either --store or --target, got both", param="target")
    if not 0 < timeout < float("inf"):
        raise InvalidRequest(f"--timeout must be a number of seconds > 0, got {timeout}", param="timeout")
    from knnlm.clients.call import Connection
    from knnlm.clients.rpc import GrpcDatastore
    from knnlm.transport.security import Tls

    tls = Tls.of(tls_ca_file, tls_cert_file, tls_key_file)
    client = GrpcDatastore(Connection(target, api_key=api_key(api_key_file), timeout=timeout, tls=tls))
    replicas = asyncio.run(_through_service(client, domain, version, wait=wait))
    if as_json:
        print_json({"domain": domain, "version": version, "replicas": [asdict(r) for r in replicas]})
        return
    there = sum(r.version == version for r in replicas)
    print(f"{domain} is now {version} on {there} of {len(replicas)} replicas")


def _in_store(domain: str, version: str, store: Path, *, as_json: bool) -> None:
    """Name it in the store, which services watch."""
    from knnlm.datastore.catalog import Catalog

    catalog = Catalog(store)
    before = catalog.current(domain)
    catalog.activate(domain, version)
    if as_json:
        print_json({"domain": domain, "version": version, "previous": before})
    else:
        print(f"{domain} is now {version}" + (f" (was {before})" if before else ""))


async def _through_service(
    client: "GrpcDatastore", domain: str, version: str, *, wait: bool
) -> "Sequence[DomainReplica]":
    """The replicas that have the domain, or do not answer, once it is done."""
    from knnlm.clients.rpc import ABSENT

    def having(replicas: "Sequence[DomainReplica]") -> "list[DomainReplica]":
        return [replica for replica in replicas if replica.state != ABSENT]

    with progress("replicas", None, description=f"{domain} {version}") as bar:

        def show(replicas: "Sequence[DomainReplica]") -> None:
            counted = having(replicas)
            bar(sum(r.version == version for r in counted), total=len(counted))

        async with client:
            await client.activate(domain, version, wait=wait, progress=show)
            return having(await client.replicas(domain))


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


@domains.command()
def prune(
    domain: DomainArgument,
    keep: Annotated[int, typer.Option(min=0, help="Versions kept beside the current one: the latest.")] = 2,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Delete the older versions of a domain for good, as many additions leave them. The current one always stays."""
    from knnlm.datastore.catalog import Catalog

    catalog = Catalog(store)
    current = catalog.current(domain)
    others = [version for version in catalog.versions(domain) if version != current]
    removed = others[: max(0, len(others) - keep)]
    for version in removed:
        catalog.remove(domain, version)
    if as_json:
        print_json({"domain": domain, "removed": removed, "kept": catalog.versions(domain)})
    else:
        print(f"removed {', '.join(removed) or 'nothing'} of {domain}, kept {', '.join(catalog.versions(domain))}")
