"""A service behind a service: the settings that say how it is reached, checked, and as a connection of the clients."""

from pydantic import SecretStr

from knnlm.clients.call import Connection, Observer
from knnlm.transport.security import ApiKey, SecretFile, Tls
from services.runtime.settings import HttpSettings, named


def connection(
    settings: HttpSettings, service: str, *, wait: float, observer: Observer | None = None, target: str | None = None
) -> Connection:
    """The connection of the settings `<service>_target`, `_api_key`, `_api_key_file`, `_tls_ca_file`, `_tls_cert_file`
    and `_tls_key_file`. target: another one than that of the settings.

    Raises InvalidRequest for a file that cannot be used.
    """
    secret: SecretStr | None = getattr(settings, f"{service}_api_key")
    file = getattr(settings, f"{service}_api_key_file")
    key: ApiKey = None if secret is None else secret.get_secret_value()
    tls = Tls.of(*(getattr(settings, f"{service}_tls_{name}_file") for name in ("ca", "cert", "key")))
    return Connection(
        target or getattr(settings, f"{service}_target"),
        api_key=key if file is None else SecretFile(file),
        tls=tls,
        wait=wait,
        observer=Observer() if observer is None else observer,
    )


def check_upstream(settings: HttpSettings, service: str) -> None:
    """Raises ValueError, as validators of settings do, for a key that is given twice and for half of a certificate."""
    key, file = f"{service}_api_key", f"{service}_api_key_file"
    if getattr(settings, key) is not None and getattr(settings, file) is not None:
        raise ValueError(f"give {named(settings, key)} or {named(settings, file)}, not both")
    pair = [f"{service}_tls_cert_file", f"{service}_tls_key_file"]
    missing = [name for name in pair if getattr(settings, name) is None]
    if len(missing) == 1:
        given = pair[1 - pair.index(missing[0])]
        raise ValueError(f"{named(settings, given)} needs {named(settings, missing[0])} beside it")
