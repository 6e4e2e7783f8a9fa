"""`knnlm cluster serve`, `status` and `scale`: versions served by a Ray cluster."""

from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from knnlm.cli.cluster import AddressOption, cluster
from knnlm.cli.common import DEFAULT_STORE, DomainArgument, JsonOption, StoreOption, print_json, print_table
from knnlm.cli.serve import ServiceGroup, home, variables_of
from knnlm.cluster.connection import MAX_REPLICAS, configure
from knnlm.errors import InvalidRequest, NotFound

__all__ = ["cluster"]

Replicas = Annotated[int, typer.Option(min=1, max=MAX_REPLICAS, help="Replicas that each shard has at least.")]
MaxReplicas = Annotated[
    int | None, typer.Option(min=1, max=MAX_REPLICAS, help="Replicas that each shard has at most; as many as at least.")
]


@dataclass(frozen=True)
class Row:
    """replicas: of each shard, those that answer. gateways: that hold the version."""

    domain: str
    version: str
    shards: int
    replicas: tuple[int, ...]
    min_replicas: int
    max_replicas: int
    gateways: int
    path: str


@cluster.command()
def serve(
    store: StoreOption = DEFAULT_STORE,
    address: AddressOption = "auto",
    replicas: Replicas = 1,
    max_replicas: MaxReplicas = None,
    host: Annotated[
        str, typer.Option(help="Address that the gateway listens on; 0.0.0.0 for every interface.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port of the gateway; 0: a free one.")] = 8002,
    grpc_port: Annotated[int, typer.Option(help="gRPC port of the gateway; 0: a free one.")] = 9002,
) -> int:
    """Serve the domains of a store from the cluster: a datastore service that has every shard searched by a node."""
    most = _most(replicas, max_replicas)
    given = {
        "STORE": str(store.absolute()), "CLUSTER": address, "HOST": host, "PORT": port, "GRPC_PORT": grpc_port,
        "SHARD_MIN_REPLICAS": replicas, "SHARD_MAX_REPLICAS": most,
    }  # fmt: skip
    with ServiceGroup(home(), variables_of("DATASTORE", given)) as group:
        group.start("datastore")
        group.wait()
        return group.exit_code


@cluster.command()
def status(address: AddressOption = "auto", as_json: JsonOption = False) -> None:
    """List the versions that the cluster serves, and the replicas of their shards."""
    configure(address)
    from knnlm.cluster.applications import Applications, deployment

    applications = Applications(address)
    applications.connect()
    rows = []
    registry = applications.registry
    for name in registry.names():
        spec, (domain, _, version) = registry.spec(name), name.partition("@")
        if spec is not None:
            answering = applications.replicas(name)
            counts = tuple(answering.get(deployment(number), 0) for number in range(len(spec.sizes)))
            bounds = (spec.options.min_replicas, spec.options.max_replicas)
            rows.append(Row(domain, version, len(counts), counts, *bounds, registry.holders(name), spec.path))
    applications.close()
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    print_table(
        ["domain", "version", "shards", "replicas", "bounds", "gateways", "folder"],
        [
            [r.domain, r.version, str(r.shards), " ".join(map(str, r.replicas)),
             f"{r.min_replicas} to {r.max_replicas}", str(r.gateways), r.path]
            for r in rows
        ],
        left=(0, 1, 3, 4, 6),
    )  # fmt: skip


@cluster.command()
def scale(
    domain: DomainArgument,
    replicas: Annotated[
        int, typer.Argument(min=1, max=MAX_REPLICAS, help="Replicas that each shard is to have, at least.")
    ],
    max_replicas: MaxReplicas = None,
    version: Annotated[
        str | None, typer.Option(help="Scale this version alone; by default all that are served.")
    ] = None,
    address: AddressOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Change how many replicas the shards of a domain have, while they answer."""
    most = _most(replicas, max_replicas)
    configure(address)
    from knnlm.cluster.applications import Applications

    applications = Applications(address)
    applications.connect()
    there = applications.registry.names()
    names = [n for n in there if n == f"{domain}@{version}" or (version is None and n.startswith(f"{domain}@"))]
    if not names:
        wanted = domain if version is None else f"{domain}@{version}"
        raise NotFound(
            f"the cluster does not serve {wanted}; it serves {', '.join(there) or 'nothing'}", param="domain"
        )
    for name in names:
        applications.scale(name, replicas, most)
    applications.close()
    if as_json:
        print_json([{"application": name, "min_replicas": replicas, "max_replicas": most} for name in names])
        return
    for name in names:
        print(f"{name}: {replicas} to {most} replicas of each shard")


def _most(replicas: int, max_replicas: int | None) -> int:
    """The largest number of replicas. Raises InvalidRequest for one below the least."""
    if max_replicas is not None and max_replicas < replicas:
        raise InvalidRequest(f"--max-replicas must be at least {replicas}, got {max_replicas}", param="max_replicas")
    return replicas if max_replicas is None else max_replicas
