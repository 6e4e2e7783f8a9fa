"""Who may call what: API keys, compared in constant time, deny by default.

| keys set             | ordinary calls        | admin calls                                   |
|----------------------|-----------------------|-----------------------------------------------|
| none                 | anyone                | anyone, if the service listens on loopback only |
| api_keys             | an API key            | nobody (403): set admin_api_keys              |
| admin_api_keys       | anyone                | an admin key                                  |
| both                 | an API or admin key   | an admin key                                  |

Where ordinary calls are open, an Authorization header that is no admin key is ignored: clients send empty ones.
"""

import hashlib
import hmac
from collections.abc import Sequence
from ipaddress import ip_address

from knnlm.errors import PermissionDenied, Unauthenticated
from services.runtime import calls
from services.runtime.settings import HttpSettings

__all__ = ["Keys", "admin_only"]


class Keys:
    """The keys of one service, as digests."""

    def __init__(self, settings: HttpSettings) -> None:
        self._ordinary = _digests([key.get_secret_value() for key in settings.api_keys])
        self._admin = _digests([key.get_secret_value() for key in settings.admin_api_keys])
        self._open_admin = not self._ordinary and not self._admin and is_loopback(settings.host)

    def admits(self, authorization: str | None) -> bool:
        """Whether the caller is an admin. Raises Unauthenticated when it may not call at all."""
        if self._open_admin:
            return True
        digest = _digest(_bearer(authorization))
        admin = _holds(self._admin, digest)
        ordinary = _holds(self._ordinary, digest)
        if self._ordinary and not (ordinary or admin):
            given = "a wrong one was given" if authorization else "none was given"
            raise Unauthenticated(f"an API key is needed as 'Authorization: Bearer KEY', {given}")
        return admin


async def admin_only() -> None:
    """A FastAPI dependency and a check for rpcs: raises PermissionDenied unless the call came with an admin key."""
    if not calls.current().admin:
        raise PermissionDenied("this call needs a key of admin_api_keys (or a service on loopback without any key)")


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bearer(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _digests(keys: Sequence[str]) -> list[bytes]:
    return [_digest(key) for key in keys]


def _holds(digests: Sequence[bytes], digest: bytes) -> bool:
    found = False
    for known in digests:  # every one, so that the time tells nothing
        found |= hmac.compare_digest(known, digest)
    return found
