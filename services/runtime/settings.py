"""What a service can be told at start-up: one record per setting, from which flag, environment and help derive.

A field `max_k` of a service with env_prefix KNNLM_DATASTORE_ is the flag --max-k and the variable
KNNLM_DATASTORE_MAX_K. A flag wins over the environment, the environment over the default. Nothing is read at import.
"""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from services.runtime.errors import MAX_SHOWN_CHARACTERS

T = TypeVar("T", bound="HttpSettings")
_KINDS = {bool: "true|false", int: "INT", float: "NUMBER", str: "TEXT", SecretStr: "SECRET", Path: "PATH"}
_FLAG = re.compile(r"--[a-z][a-z0-9-]*")


def _split(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]  # a comma list
SecretNames = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split)]
# empty is none: files such as docker-compose.yml set variables that nobody filled to nothing
OptionalPath = Annotated[Path | None, BeforeValidator(lambda value: None if value == "" else value)]


class HttpSettings(BaseSettings):
    """What every service has. Derive, set env_prefix="KNNLM_<SERVICE>_" in model_config, add fields."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 picks a free one, which is logged")
    api_keys: SecretNames = Field((), description="keys that callers must send as Bearer token; none: open to all")
    admin_api_keys: SecretNames = Field((), description="keys for admin calls, good for every other call too")
    api_keys_file: OptionalPath = Field(
        None, description="file with more of api_keys, one per line; read again when it changes"
    )
    admin_api_keys_file: OptionalPath = Field(
        None, description="file with more of admin_api_keys, one per line; read again when it changes"
    )
    tls_cert_file: OptionalPath = Field(
        None, description="PEM certificate, its chain after it: HTTPS and gRPC over TLS; read again when it changes"
    )
    tls_key_file: OptionalPath = Field(None, description="PEM key of tls_cert_file, without a password")
    tls_client_ca_file: OptionalPath = Field(
        None,
        description="PEM of the authorities that vouch for clients, which then must present a certificate (mutual TLS)",
    )
    max_concurrent_requests: int = Field(256, ge=1, description="requests in work at once; more are refused with 429")
    max_body_bytes: int = Field(16_777_216, ge=1024, description="largest HTTP request body; more is refused with 413")
    max_inflight_bytes: int = Field(
        1_073_741_824, ge=1024, description="bytes of the requests in work together; more are refused with 429"
    )
    request_timeout_s: float = Field(60.0, gt=0, description="seconds a request may take; callers can ask for less")
    drain_timeout_s: float = Field(30.0, ge=0, description="seconds that accepted requests get to finish at shutdown")
    keep_alive_timeout_s: int = Field(120, ge=1, description="seconds an idle HTTP connection stays open")
    otlp_endpoint: str = Field(
        "", description="URL of an OpenTelemetry collector, as http://collector:4318, to send traces to; empty: none"
    )
    trace_sample_ratio: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of the traces begun here that are sent; others say it themselves",
    )
    log_format: Literal["text", "json"] = Field("text", description="one line per event: key=value, or JSON")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe level logged")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags and the environment: no .env file, no folder of secrets."""
        del settings_cls, dotenv_settings, file_secret_settings
        return init_settings, env_settings

    @model_validator(mode="after")
    def _collector_is_a_url(self) -> Self:
        if self.otlp_endpoint and (problem := _problem_of_url(self.otlp_endpoint)):
            raise ValueError(f"{named(self, 'otlp_endpoint')} {problem}")  # unshown: it may hold a password
        return self

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            pair = ["tls_cert_file", "tls_key_file"]
            given, missing = pair if self.tls_key_file is None else reversed(pair)
            raise ValueError(f"{named(self, given)} needs {named(self, missing)} beside it")
        if self.tls_client_ca_file is not None and self.tls_cert_file is None:
            raise ValueError(
                f"{named(self, 'tls_client_ca_file')} needs {named(self, 'tls_cert_file')} and its key beside it"
            )
        return self

    @model_validator(mode="after")
    def _one_body_fits(self) -> Self:
        if self.max_body_bytes > self.max_inflight_bytes:
            raise ValueError(
                f"max_body_bytes must be at most max_inflight_bytes, got {self.max_body_bytes} and "
                f"{self.max_inflight_bytes}"
            )
        return self


class GrpcSettings(HttpSettings):
    """A service that speaks gRPC as well."""

    grpc_port: int = Field(9000, ge=0, le=65535, description="gRPC port; 0 picks a free one, which is logged")
    grpc_max_message_bytes: int = Field(67_108_864, ge=65_536, description="largest gRPC message, in and out")
    grpc_receive_timeout_s: float = Field(
        5.0, gt=0, description="seconds in which a gRPC call that waits to send its message has its turn to"
    )
    grpc_max_connection_age_s: float = Field(
        30.0, ge=1, le=86_400, description="seconds until a gRPC client must connect again, and so finds new replicas"
    )

    @model_validator(mode="after")
    def _one_message_fits(self) -> Self:
        if self.grpc_max_message_bytes > self.max_inflight_bytes:
            raise ValueError(
                f"grpc_max_message_bytes must be at most max_inflight_bytes, got {self.grpc_max_message_bytes} and "
                f"{self.max_inflight_bytes}"
            )
        return self


def load_settings(cls: type[T], argv: Sequence[str], *, prog: str) -> T:
    """Read flags and environment. Exits with status 2 and one message naming flag, variable, value and expectation."""
    parser = _parser(cls, prog)
    known, unknown = parser.parse_known_args(list(argv))
    if unknown:  # argparse would print what follows as well, and that may be a secret
        flags = [found[0] for part in unknown if (found := _FLAG.match(part))] or ["a value without a flag"]
        parser.exit(2, f"{prog}: unknown: {', '.join(flags)}; --help lists the flags\n")
    given = vars(known)
    try:
        settings = cls(**given)
    except ValidationError as err:
        parser.exit(2, f"{prog}: {_explain(cls, err, given, os.environ)}\n")
    return settings


def named(settings: "HttpSettings | type[HttpSettings]", name: str) -> str:
    """A setting as its two names, for an error that is about it."""
    cls = settings if isinstance(settings, type) else type(settings)
    return f"{_flag(name)} (environment: {_variable(cls, name)})"


def unknown_variables(cls: type[HttpSettings], environ: Mapping[str, str]) -> list[str]:
    """Variables with the service's prefix that set nothing: most often a misspelling."""
    prefix = _prefix(cls)
    known = {_variable(cls, name) for name in cls.model_fields}
    return sorted(name for name in environ if name.startswith(prefix) and name.upper() not in known)


def described(settings: HttpSettings) -> dict[str, str]:
    """Every setting as text, secrets only counted."""
    shown = {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if _is_secret(field):
            shown[name] = "set" if value else "none"
        else:
            shown[name] = ",".join(value) if isinstance(value, tuple) else str(value)
    return shown


def _parser(cls: type[HttpSettings], prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=cls.__doc__, allow_abbrev=False)
    for name, field in cls.model_fields.items():
        text = f"{field.description} [{_default(field)}] [env {_variable(cls, name)}]"
        parser.add_argument(
            _flag(name), dest=name, metavar=_kind(field), default=argparse.SUPPRESS, help=text.replace("%", "%%")
        )
    return parser


def _explain(
    cls: type[HttpSettings], err: ValidationError, given: Mapping[str, object], environ: Mapping[str, str]
) -> str:
    problem = err.errors(include_url=False, include_context=False)[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if name not in cls.model_fields:  # a check across fields: its own words name them
        return f"bad settings: {problem['msg'].removeprefix('Value error, ')}"
    if problem["type"] == "missing":
        return f"{named(cls, name)} must be given: {cls.model_fields[name].description}"
    variables = {variable.upper(): text for variable, text in environ.items()}  # either case is read
    value = given.get(name, variables.get(_variable(cls, name)))
    shown = "***" if _is_secret(cls.model_fields[name]) else repr(value)[:MAX_SHOWN_CHARACTERS]
    expected = problem["msg"][0].lower() + problem["msg"][1:]
    source = "flag" if name in given else "environment"
    return f"{named(cls, name)}: {expected}, got {shown} from the {source}"


def _problem_of_url(text: str) -> str | None:
    try:
        url = urlsplit(text)
        valid = url.scheme in ("http", "https") and url.hostname is not None and url.port != 0
    except ValueError:  # such as a port that is no number
        valid = False
    if not valid:
        return "must be a URL that begins with http:// or https://"
    if url.username is not None or url.query:
        return "must hold no credentials, it is logged: OTEL_EXPORTER_OTLP_HEADERS is the place for them"
    return None


def _prefix(cls: type[HttpSettings]) -> str:
    return str(cls.model_config.get("env_prefix", ""))


def _variable(cls: type[HttpSettings], name: str) -> str:
    return (_prefix(cls) + name).upper()


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_secret(field: FieldInfo) -> bool:
    return SecretStr in get_args(field.annotation) or field.annotation is SecretStr


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default in (None, ()):
        return "default: none"
    return f"default: {field.default}"


def _kind(field: FieldInfo) -> str:
    annotation: Any = field.annotation  # an annotation is any object
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        return "A,B"
    for kind, word in _KINDS.items():
        if annotation is kind or kind in get_args(annotation):
            return word
    return "VALUE"
