"""Secrets that lie in files, so that they are in no command line and can be replaced while a process runs.

A file is read again at most once a second. It is its content that is compared, not its time: the files are small, and
two writes within one tick of the file system's clock have the same time. Replace a file by renaming another onto it, or
by a link that is switched, as Kubernetes does: a reader may then see the old content or the new, and never a part.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from knnlm.errors import InvalidRequest

__all__ = ["ApiKey", "SecretFile", "SecretLines"]

LOG = logging.getLogger(__name__)
ApiKey: TypeAlias = str | Callable[[], str | None] | None  # itself, or what tells it for each call
LOOK_SECONDS = 1.0
LARGEST = 1 << 20  # bytes; whoever names a larger file has named the wrong one


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


def _read(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as err:
        raise InvalidRequest(f"cannot read {path}: {err.strerror or err}") from err
    if len(content) > LARGEST:
        raise InvalidRequest(f"{path} has more than {LARGEST} bytes: expected one secret per line")
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
