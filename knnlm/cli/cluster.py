"""`knnlm cluster build`: building beyond one machine, on Ray. Serving from there: cluster_serving.py."""

from typing import Annotated

import typer

from knnlm.cli.build import NO_INDEX, print_built
from knnlm.cli.common import (
    DEFAULT_STORE,
    ActivateOption,
    BatchTokensOption,
    BosOption,
    BuildContextOption,
    BuildMinContextOption,
    BuildVersionOption,
    DeviceOption,
    DomainArgument,
    DtypeOption,
    JsonOption,
    KeyDtypeOption,
    KeyFunctionOption,
    ModelOption,
    PartOption,
    RecipeOption,
    StoreOption,
    parse_part,
    remark,
    showing,
)
from knnlm.errors import InvalidRequest, KnnlmError

cluster = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Build on a Ray cluster of many machines, and serve from it."
)

AddressOption = Annotated[
    str,
    typer.Option(help="The Ray cluster: auto, HOST:PORT or ray://HOST:PORT; local starts one in this process."),
]


@cluster.command("build")
def build(
    domain: DomainArgument,
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Text: .txt, .md, .rst, .jsonl or .parquet files, folders of them, or URLs (s3://, gs://)."
        ),
    ],
    model: ModelOption,
    address: AddressOption = "auto",
    store: StoreOption = DEFAULT_STORE,
    version: BuildVersionOption = None,
    shards: Annotated[int | None, typer.Option(help="Number of shards; by default as --shard-bytes asks for.")] = None,
    shard_bytes: Annotated[
        int | None, typer.Option(help="Bytes of keys and values in one shard, at most; by default 64 GiB.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Workers with the model; by default one for each GPU, or as processors allow."),
    ] = None,
    worker_cpus: Annotated[int, typer.Option(help="Processors for each worker, where there is no GPU.")] = 2,
    parts_at: Annotated[
        str | None,
        typer.Option(help="Folder in an object store (URL) for keys until they are in shards; by default the store."),
    ] = None,
    part: PartOption = "all",
    context_length: BuildContextOption = None,
    min_context: BuildMinContextOption = None,
    bos: BosOption = "document",
    key_dtype: KeyDtypeOption = "float16",
    key_function: KeyFunctionOption = "ffn_input",
    batch_tokens: BatchTokensOption = 8192,
    index: RecipeOption = "auto",
    activate: ActivateOption = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Build a datastore of shards on a Ray cluster. Stopped builds continue with the same command."""
    from knnlm.cluster.build import Plan, Workers
    from knnlm.cluster.build import build as run
    from knnlm.cluster.worker import ModelSource
    from knnlm.datastore.catalog import Catalog
    from knnlm.datastore.manifest import FLAT

    if ":/" in str(store):
        raise InvalidRequest(
            f"store {str(store)!r} is an object store: the store is a folder that every node sees at the same path "
            "(a disk they share, a bucket that is mounted); sources and --parts-at may be URLs",
            param="store",
        )
    wanted = Plan(
        ModelSource(model, device, dtype, key_function), version, parse_part(part), context_length, min_context, bos,
        key_dtype, batch_tokens, index=FLAT if index == NO_INDEX else index, shards=shards, shard_bytes=shard_bytes,
        parts_at=parts_at,
    )  # fmt: skip
    try:
        with showing() as on_progress:
            path, reasons = run(
                sources, Catalog(store), domain, wanted, Workers(address, workers, worker_cpus), activate=activate,
                on_progress=on_progress,
            )  # fmt: skip
    except InvalidRequest:  # the same command would be refused again
        raise
    except (KnnlmError, KeyboardInterrupt):
        remark("stopped: the same command continues where it was")
        raise
    print_built(path, reasons, active=activate, as_json=as_json)
