"""TLS as the clients speak it: whom they trust, and the certificate by which they are known. One record for both faces.

The files are read when a channel or context is made; connections made from it keep what was read then.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from knnlm.errors import InvalidRequest

__all__ = ["Tls", "load_authorities", "load_pair", "read_pem"]


@dataclass(frozen=True)
class Tls:
    """ca_file: PEM of who may vouch for a service; None: the roots that come with gRPC, or with the system for HTTP.
    cert_file, key_file: PEM of the client's own certificate (its chain after it) and key, where services ask for one.

    Raises InvalidRequest when only one of the two is given; that of a file that cannot be used comes when it is read.
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
        """As settings and options say it: None, which is no TLS, when no file is given. Raises as making it does."""
        files = (ca_file, cert_file, key_file)
        return None if files == (None, None, None) else cls(*files)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For grpc.aio.secure_channel. Raises InvalidRequest that names the file: gRPC itself would fail in silence."""
        self.ssl_context()
        authorities, certificate, key = (
            None if path is None else read_pem(path) for path in (self.ca_file, self.cert_file, self.key_file)
        )
        return grpc.ssl_channel_credentials(authorities, key, certificate)

    def ssl_context(self) -> ssl.SSLContext:
        """For httpx: TLS 1.2 or later, names and certificates of services checked. Raises InvalidRequest, see above."""
        context = ssl.create_default_context() if self.ca_file is None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.ca_file is not None:
            load_authorities(context, self.ca_file)
        if self.cert_file is not None and self.key_file is not None:
            load_pair(context, self.cert_file, self.key_file)
        return context


def load_authorities(context: ssl.SSLContext, path: Path) -> None:
    """Trust who is in the file, too. Raises InvalidRequest that names it."""
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
