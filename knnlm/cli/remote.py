"""How a command reaches a running service: its key and TLS, as options that several commands have."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.errors import InvalidRequest

if TYPE_CHECKING:
    from knnlm.clients.aggregator import Client
    from knnlm.transport.security import ApiKey

API_KEY = "KNNLM_API_KEY"
CALL_SECONDS = 600.0  # a long text, a large model

ModelNameOption = Annotated[
    str | None,
    typer.Option("--model", envvar="KNNLM_MODEL", help="Hugging Face folder or hub id; with --remote its name there."),
]
RemoteOption = Annotated[str | None, typer.Option(help="Ask the aggregator at this URL.")]
RemoteKeyOption = Annotated[Path | None, typer.Option(help="With --remote: file with the key to send.")]
TlsCaOption = Annotated[
    Path | None, typer.Option(help="PEM of the authorities that vouch for the service, which is then asked over TLS.")
]
TlsCertOption = Annotated[
    Path | None, typer.Option(help="PEM certificate to present to the service, with --tls-key-file.")
]
TlsKeyOption = Annotated[Path | None, typer.Option(help="PEM key of --tls-cert-file.")]


def api_key(file: Path | None) -> "ApiKey":
    """The key in the file, read again when it changes; else that of the environment, if any."""
    from knnlm.transport.security import SecretFile

    return os.environ.get(API_KEY) if file is None else SecretFile(file)


def refuse_without(option: str, context: typer.Context, *names: str) -> None:
    """Raise InvalidRequest for the first of the options that was given, though it means nothing without `option`."""
    for name in names:
        if is_given(context, name):
            raise InvalidRequest(f"--{name.replace('_', '-')} means nothing without {option}", param=name)


def refuse_beside(option: str, context: typer.Context, *names: str) -> None:
    """Raise InvalidRequest for the first of the options that was given, though `option` leaves nothing to it."""
    for name in names:
        if is_given(context, name):
            raise InvalidRequest(f"--{name.replace('_', '-')} means nothing with {option}", param=name)


def service(url: str, key_file: Path | None, tls_files: "tuple[Path | None, Path | None, Path | None]") -> "Client":
    """A client of the aggregator at url. tls_files: authorities, certificate, key. Raises as Client does."""
    from knnlm.clients.aggregator import Client

    ca, certificate, key = tls_files
    return Client(url, api_key=api_key(key_file), timeout=CALL_SECONDS, ca_file=ca, cert_file=certificate, key_file=key)


def is_given(context: typer.Context, name: str) -> bool:
    """Whether the option stands on the command line: what the environment says is meant for other commands as well."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
