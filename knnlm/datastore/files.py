"""Files that are either whole or absent: atomic writes, durable renames, checksums, locks. Knows no format.

A rename is atomic only inside one file system and durable only once the folder is synced; both are done here, so that
nobody above has to remember.
"""

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from knnlm.errors import Conflict, DatastoreError

CHUNK = 1 << 20

__all__ = ["disk_errors", "locked", "sha256_of", "sync_file", "sync_folder", "write_atomic"]


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system refuses (disk full, no permission) into a DatastoreError that names the path."""
    try:
        yield
    except OSError as err:
        raise DatastoreError(f"cannot write {path}: {err.strerror or err}") from err


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: after a crash at any moment it holds the old content or the new, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    with disk_errors(path):
        try:
            with temporary.open("xb") as file:
                file.write(data)
                sync_file(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_file(descriptor: int) -> None:
    """To the disk itself: on macOS plain fsync leaves the data in the drive's cache."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None:
        os.fsync(descriptor)
    else:
        fcntl.fcntl(descriptor, full)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: what was created, renamed or removed in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Of the whole file, read once in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def locked(path: Path, *, wait: bool, doing: str) -> Iterator[None]:
    """Hold the advisory lock of a file or folder that exists; the system drops it when the process dies.

    With wait=False a lock that somebody else holds is a Conflict, which says that they are `doing` it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise Conflict(f"another process is {doing}: {path.parent} is locked") from err
        yield
    finally:
        os.close(descriptor)
