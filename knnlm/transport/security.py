"""Keys and certificates that lie in files: what a client presents and trusts, and how a service reads its own.

A file of secrets is read again at most once a second, so that it can be replaced while a process runs. Its content is
compared, not its time: the files are small, and two writes within one tick of the file system's clock have the same
time. Replace a file by renaming another onto it, or by a link that is switched, as Kubernetes does: a reader then sees
the old content or the new, never a part. Certificates are read when a channel or context is made.
"""

import logging
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import grpc

from knnlm.errors import InvalidRequest

LOG = logging.getLogger(__name__)
ApiKey: TypeAlias = str | Callable[[], str | None] | None  # the key, or a function that gives it for each call
LOOK_SECONDS = 1.0
MAX_SECRET_BYTES = 1 << 20  # a larger file is not one of secrets


class SecretLines:
    """The lines of a file that are neither empty nor begin with #, stripped. Raises InvalidRequest naming the file when
    it cannot be read, holds no such line, or one that is not printable ASCII: no header could carry it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = _read(path)

    def refresh(self) -> bool:
        """Read the file again; whether it says something else. Raises as at first, and keeps the lines it had."""
        lines = _read(self.path)
        changed = lines != self.lines
        self.lines = lines
        return changed

    def __repr__(self) -> str:
        return f"SecretLines({str(self.path)!r})"


class SecretFile:
    """The first line of a SecretLines: call it for the secret as it is now.

    Making it raises InvalidRequest when there is none. Later a file that is gone or empty is taken for one that is just
    being replaced: the last secret stays good, and one warning is logged until the file is back.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._lines = SecretLines(path)
        self._clock = clock
        self._looked = clock()
        self._missing = False

    def __call__(self) -> str:
        now = self._clock()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._look()
        return self._lines.lines[0]

    def __repr__(self) -> str:
        return f"SecretFile({str(self._lines.path)!r})"

    def _look(self) -> None:
        try:
            self._lines.refresh()
        except InvalidRequest as err:
            if not self._missing:
                LOG.warning("the former secret is kept: %s", err.message)
            self._missing = True
        else:
            self._missing = False


def current_key(key: ApiKey) -> str | None:
    """The key as it is now. Raises InvalidRequest, which does not show it, for one that no header could carry."""
    now = key() if callable(key) else key
    if now and not (now.isascii() and now.isprintable() and now == now.strip()):
        raise InvalidRequest("a key must be printable ASCII without spaces around it", param="api_key")
    return now


@dataclass(frozen=True)
class Tls:
    """How a client speaks TLS, over gRPC and HTTP.

    ca_file: PEM of the authorities that vouch for services; None: the roots that come with gRPC, or the system's for
    HTTP. cert_file, key_file: PEM of the client's own certificate (its chain after it) and key, for services that ask
    for one. Raises InvalidRequest when only one of the two is given; a file that cannot be used raises when it is read.
    """

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            given, missing = ("cert_file", "key_file") if self.key_file is None else ("key_file", "cert_file")
            raise InvalidRequest(f"{given} needs {missing} beside it, got none", param=missing)

    @classmethod
    def of(cls, ca_file: Path | None, cert_file: Path | None, key_file: Path | None) -> "Tls | None":
        """The record, or None (no TLS) when no file is given. Raises InvalidRequest as making it does."""
        files = (ca_file, cert_file, key_file)
        return None if files == (None, None, None) else cls(*files)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Credentials for grpc.aio.secure_channel. Raises InvalidRequest naming a bad file (gRPC would not)."""
        self.ssl_context()
        authorities, certificate, key = (
            None if path is None else read_pem(path) for path in (self.ca_file, self.cert_file, self.key_file)
        )
        return grpc.ssl_channel_credentials(authorities, key, certificate)

    def ssl_context(self) -> ssl.SSLContext:
        """A context for httpx: TLS 1.2 or later, services are verified. Raises InvalidRequest naming a bad file."""
        context = ssl.create_default_context() if self.ca_file is None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.ca_file is not None:
            load_authorities(context, self.ca_file)
        if self.cert_file is not None and self.key_file is not None:
            load_pair(context, self.cert_file, self.key_file)
        return context


def load_authorities(context: ssl.SSLContext, path: Path) -> None:
    """Trust the authorities in the file, too. Raises InvalidRequest that names it."""
    read_pem(path)
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError as err:
        raise InvalidRequest(f"{path} holds no certificates: {err.reason or err}") from err


def load_pair(context: ssl.SSLContext, cert_file: Path, key_file: Path) -> None:
    """Use a certificate and its key. Raises InvalidRequest that names the files."""
    for path in (cert_file, key_file):
        read_pem(path)
    try:
        context.load_cert_chain(cert_file, key_file, password="")  # or OpenSSL asks the terminal for one
    except (ssl.SSLError, ValueError) as err:
        reason = getattr(err, "reason", None) or err
        raise InvalidRequest(
            f"{cert_file} and {key_file} are no certificate and its key without a password: {reason}"
        ) from err


def read_pem(path: Path) -> bytes:
    """The bytes of the file. Raises InvalidRequest that names it when it cannot be read, or is empty."""
    try:
        content = path.read_bytes()
    except OSError as err:
        raise InvalidRequest(f"cannot read {path}: {err.strerror or err}") from err
    if not content.strip():
        raise InvalidRequest(f"{path} is empty, expected PEM")
    return content


def _read(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_SECRET_BYTES + 1)
    except OSError as err:
        raise InvalidRequest(f"cannot read {path}: {err.strerror or err}") from err
    if len(content) > MAX_SECRET_BYTES:
        raise InvalidRequest(f"{path} has more than {MAX_SECRET_BYTES} bytes: expected one secret per line")
    try:
        stripped = [line.strip() for line in content.decode("ascii").splitlines()]
    except UnicodeDecodeError as err:
        raise InvalidRequest(
            f"{path} holds what is not ASCII at byte {err.start}: expected one secret per line"
        ) from None
    lines = tuple(line for line in stripped if line and not line.startswith("#"))
    if not lines:
        raise InvalidRequest(f"{path} holds no secret: expected one per line")
    if not all(line.isprintable() for line in lines):
        raise InvalidRequest(f"{path} holds a line with control characters: expected one secret per line")
    return lines
