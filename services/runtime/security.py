"""Who may call what: API keys, compared in constant time, deny by default; and files that are read again.

| keys set             | ordinary calls        | admin calls                                   |
|----------------------|-----------------------|-----------------------------------------------|
| none                 | anyone                | anyone, if the service listens on loopback only |
| api_keys             | an API key            | nobody (403): set admin_api_keys              |
| admin_api_keys       | anyone                | an admin key                                  |
| both                 | an API or admin key   | an admin key                                  |

Keys come from the settings themselves and from files, which FileReloader reads again every second, as it does with
certificates: a key that is new there is good, and one that is gone from there is not, within some seconds. Which row of
the table holds is decided at start and never changes: a file that can no longer be read leaves the keys as they were.

Where ordinary calls are open, an Authorization header that is no admin key is ignored: clients send empty ones.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Protocol

from pydantic import SecretStr

from knnlm.errors import InvalidRequest, PermissionDenied, Unauthenticated
from knnlm.transport.security import SecretLines
from services.runtime.context import current
from services.runtime.observability import event
from services.runtime.settings import HttpSettings, named

LOG = logging.getLogger(__name__)
RELOAD_SECONDS = 1.0


class Keys:
    """The keys of one service, as digests. A Reloadable.

    Raises InvalidRequest that names the setting whose file cannot be read or holds no key.
    """

    name = "keys"

    def __init__(self, settings: HttpSettings) -> None:
        self._ordinary = _Group(settings, "api_keys", settings.api_keys, settings.api_keys_file)
        self._admin = _Group(settings, "admin_api_keys", settings.admin_api_keys, settings.admin_api_keys_file)
        self._open_admin = not self._ordinary.digests and not self._admin.digests and is_loopback(settings.host)

    @property
    def watched(self) -> bool:
        """Whether any keys come from files."""
        return self._ordinary.file is not None or self._admin.file is not None

    def refresh(self) -> None:
        """Take over what the files say now. Raises InvalidRequest when one cannot be read: its keys stay."""
        changed, problems = False, []
        for group in (self._ordinary, self._admin):
            try:
                changed |= group.refresh()
            except InvalidRequest as err:
                problems.append(err.message)
        if changed:
            counts = {"api_keys": len(self._ordinary.digests), "admin_api_keys": len(self._admin.digests)}
            event(LOG, "keys_changed", **counts)
        if problems:
            raise InvalidRequest("; ".join(problems))

    def admits(self, authorization: str | None) -> bool:
        """Whether the caller is an admin. Raises Unauthenticated when it may not call at all."""
        if self._open_admin:
            return True
        digest = _digest(_bearer(authorization))
        admin = _holds(self._admin.digests, digest)
        ordinary = _holds(self._ordinary.digests, digest)
        if self._ordinary.digests and not (ordinary or admin):
            given = "a wrong one was given" if authorization else "none was given"
            raise Unauthenticated(f"an API key is needed as 'Authorization: Bearer KEY', {given}")
        return admin


class _Group:
    """The keys of one kind. `digests` is replaced as a whole, from another thread than the one that reads it."""

    def __init__(self, settings: HttpSettings, setting: str, given: Sequence[SecretStr], path: Path | None) -> None:
        self._setting = named(settings, f"{setting}_file")
        self._given = [key.get_secret_value() for key in given]
        self.file: SecretLines | None = None
        if path is not None:
            try:
                self.file = SecretLines(path)
            except InvalidRequest as err:
                raise InvalidRequest(f"{self._setting}: {err.message}") from err
        self.digests = self._all()

    def refresh(self) -> bool:
        """Whether the keys changed. Raises InvalidRequest that names the setting."""
        if self.file is None:
            return False
        try:
            changed = self.file.refresh()
        except InvalidRequest as err:
            raise InvalidRequest(f"{self._setting}: {err.message}") from err
        if changed:
            self.digests = self._all()
        return changed

    def _all(self) -> tuple[bytes, ...]:
        keys = (*self._given, *(() if self.file is None else self.file.lines))
        return tuple(_digest(key) for key in dict.fromkeys(keys))


async def admin_only() -> None:
    """A FastAPI dependency and a check for rpcs: raises PermissionDenied unless the call came with an admin key."""
    if not current().admin:
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


def _holds(digests: Sequence[bytes], digest: bytes) -> bool:
    found = False
    for known in digests:  # every one, so that the time tells nothing
        found |= hmac.compare_digest(known, digest)
    return found


class Reloadable(Protocol):
    @property
    def name(self) -> str:
        """One word for the log: `keys`, `certificates`."""
        ...

    def refresh(self) -> Callable[[], None] | None:
        """Read the files, in a thread, and take over what they say now. What must be done in the event loop, between
        requests, is returned. Raises InvalidRequest when the files cannot be used: all stays as it was.
        """
        ...


class FileReloader:
    """Refreshes the parts off the hot path until it is closed. What cannot be read is logged once, until it can be."""

    def __init__(self, parts: Sequence[Reloadable], seconds: float = RELOAD_SECONDS) -> None:
        self._parts = parts
        self._seconds = seconds
        self._problems: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Called in the event loop. Does nothing when there is nothing to refresh."""
        if self._parts:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            for part in self._parts:
                await self._refresh(part)

    async def _refresh(self, part: Reloadable) -> None:
        try:
            finish = await asyncio.to_thread(part.refresh)
            if finish is not None:
                finish()
        except InvalidRequest as err:
            if self._problems.get(part.name) != err.message:
                event(LOG, f"{part.name}_kept", logging.WARNING, reason=err.message)
            self._problems[part.name] = err.message
        except Exception:  # noqa: BLE001  the edge of a task that must outlive what nobody foresaw
            event(LOG, f"{part.name}_failed", logging.ERROR)
        else:
            self._problems.pop(part.name, None)
