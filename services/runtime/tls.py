"""TLS of a service's two faces, with certificates that are renewed while it runs.

Connections that are open keep the certificate they began with; those made after a renewal get the new one. Of the
authorities that vouch for clients, a new one counts at once; one that was taken out counts over HTTP until the service
is restarted, as OpenSSL's contexts forget nobody, and over gRPC no more.
"""

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc

from knnlm.errors import InvalidRequest
from knnlm.transport.security import load_authorities, load_pair, read_pem
from services.runtime.observability import event
from services.runtime.settings import HttpSettings, named

LOG = logging.getLogger(__name__)


def server_tls(settings: HttpSettings) -> "ServerTls | None":
    """None when the settings name no certificate. Raises InvalidRequest that names the setting."""
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    try:
        return ServerTls(settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file)
    except InvalidRequest as err:
        names = ["tls_cert_file", "tls_key_file", *(["tls_client_ca_file"] if settings.tls_client_ca_file else [])]
        raise InvalidRequest(f"{', '.join(named(settings, name) for name in names)}: {err.message}") from err


@dataclass(frozen=True)
class _Content:
    certificate: bytes
    key: bytes
    authorities: bytes | None


class ServerTls:
    """`context` is for HTTP, `credentials` for gRPC: TLS 1.2 or later. A runtime.security.Reloadable.

    client_ca_file: authorities that vouch for clients; with one, callers without a certificate are refused before any
    request.
    Raises InvalidRequest that names the file which cannot be used.
    """

    name = "certificates"

    def __init__(self, cert_file: Path, key_file: Path, client_ca_file: Path | None) -> None:
        self._cert_file, self._key_file, self._client_ca_file = cert_file, key_file, client_ca_file
        self.mutual = client_ca_file is not None
        self._content = self._read()
        self.context = _context()
        self._load(self.context)
        self._renewed: grpc.ServerCertificateConfiguration | None = None
        self.credentials = grpc.dynamic_ssl_server_credentials(
            _configuration(self._content),
            self._fetch,  # type: ignore[arg-type]  # may give None, which the stubs forget
            require_client_authentication=self.mutual,
        )

    def refresh(self) -> Callable[[], None] | None:
        """What makes the faces use what the files hold now, None when that is what they use. Raises InvalidRequest when
        the files do not fit together, as in the midst of being replaced.
        """
        content = self._read()
        if content == self._content:
            return None
        self._load(_context())  # a context that is in use must not be left with a certificate and no key
        return partial(self._use, content)

    def _use(self, content: _Content) -> None:
        self._load(self.context)  # in the loop: OpenSSL wants no handshake to begin meanwhile
        self._renewed = _configuration(content)
        self._content = content
        event(LOG, "certificates_changed", cert_file=self._cert_file)

    def _read(self) -> _Content:
        authorities = None if self._client_ca_file is None else read_pem(self._client_ca_file)
        return _Content(read_pem(self._cert_file), read_pem(self._key_file), authorities)

    def _load(self, context: ssl.SSLContext) -> None:
        if self._client_ca_file is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            load_authorities(context, self._client_ca_file)
        load_pair(context, self._cert_file, self._key_file)

    def _fetch(self) -> "grpc.ServerCertificateConfiguration | None":
        """Asked by gRPC before every handshake, in a thread of its own; None: as before."""
        renewed, self._renewed = self._renewed, None
        return renewed


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _configuration(content: _Content) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(content.key, content.certificate)], content.authorities)
