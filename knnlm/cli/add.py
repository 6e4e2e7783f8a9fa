"""`knnlm add`: documents added to the current version of a domain, while it answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli.common import (
    DEFAULT_STORE,
    ActivateOption,
    DeviceOption,
    DomainArgument,
    DtypeOption,
    JsonOption,
    PartOption,
    SourcesArgument,
    StoreOption,
    parse_part,
    print_change,
    remark,
    showing,
    version_folder,
)
from knnlm.cli.remote import TlsCaOption, TlsCertOption, TlsKeyOption, api_key, is_given, refuse_without
from knnlm.errors import InvalidRequest, Unavailable

if TYPE_CHECKING:
    from knnlm.protocols import LanguageModel, LanguageModelClient

LOCAL = "127.0.0.1:9001"  # where an lm service listens unless it is told otherwise
CALL_SECONDS = 600.0  # a batch of a large model on a slow machine
PATIENCE_SECONDS = 60.0  # an lm service that restarts stops nothing


def add(
    context: typer.Context,
    domain: DomainArgument,
    sources: SourcesArgument,
    model: Annotated[
        str | None,
        typer.Option("--model", envvar="KNNLM_MODEL", help="Folder or hub id of the model that made the domain."),
    ] = None,
    lm_target: Annotated[
        str | None,
        typer.Option(help=f"Ask this lm service (gRPC, host:port); without --model, by default {LOCAL}."),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key for the lm service; else KNNLM_API_KEY, if set.")
    ] = None,
    tls_ca_file: TlsCaOption = None,
    tls_cert_file: TlsCertOption = None,
    tls_key_file: TlsKeyOption = None,
    store: StoreOption = DEFAULT_STORE,
    part: PartOption = "all",
    replace: Annotated[
        bool, typer.Option("--replace", help="Put documents in the place of those that have their ids.")
    ] = False,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in the model at once.")] = 8192,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for another change of the domain to end.")] = False,
    activate: ActivateOption = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Add documents to a domain, as a new version. Stopped additions continue with the same command."""
    from knnlm.datastore.catalog import Catalog
    from knnlm.datastore.manifest import Manifest
    from knnlm.datastore.text import read_documents
    from knnlm.datastore.updates.documents import add as run
    from knnlm.evaluation.splits import select

    catalog = Catalog(store)
    manifest = Manifest.load(version_folder(catalog, domain, None))
    documents = select(read_documents(sources), parse_part(part))
    here = model is not None and lm_target is None
    if here:
        refuse_without("--lm-target", context, "api_key_file", "tls_ca_file", "tls_cert_file", "tls_key_file")
    elif is_given(context, "model"):
        raise InvalidRequest("expected either --model or --lm-target, got both", param="lm_target")
    service = None if here else _service(lm_target, api_key_file, (tls_ca_file, tls_cert_file, tls_key_file))
    try:
        with (
            _encoder(model, service, manifest.key_function, device=device, dtype=dtype) as lm,
            showing() as on_progress,
        ):
            change = run(
                documents,
                lm,
                catalog,
                domain,
                replace=replace,
                activate=catalog.activate if activate else None,
                wait=wait,
                batch_tokens=batch_tokens,
                on_progress=on_progress,
            )
    except Unavailable as err:
        if here or lm_target is not None:
            raise
        raise Unavailable(f"{err.message}; give --lm-target, or --model to load the model here") from err
    except KeyboardInterrupt:
        remark("stopped: the same command continues where it was")
        raise
    print_change(catalog, change, active=activate, as_json=as_json)


def _service(
    target: str | None, key_file: Path | None, tls_files: "tuple[Path | None, Path | None, Path | None]"
) -> "LanguageModelClient":
    """target: None for a service on this machine, which need not be waited for: it was not asked for by name."""
    from knnlm.clients.call import Connection
    from knnlm.clients.rpc import GrpcLanguageModel
    from knnlm.transport.security import Tls

    return GrpcLanguageModel(
        Connection(
            target or LOCAL,
            api_key=api_key(key_file),
            timeout=CALL_SECONDS,
            tls=Tls.of(*tls_files),
            wait=0.0 if target is None else PATIENCE_SECONDS,
        )
    )


@contextmanager
def _encoder(
    model: str | None, service: "LanguageModelClient | None", key_function: str, *, device: str, dtype: str
) -> Iterator["LanguageModel"]:
    """The model, loaded here, or behind a service: then it says itself what its key function is."""
    if service is None:
        from knnlm.lm.model import LanguageModel

        yield LanguageModel.load(model or "", device=device, dtype=dtype, key_function=key_function)
        return
    from knnlm.clients.encoder import RemoteEncoder

    with RemoteEncoder(service) as lm:
        yield lm
