"""Files that are either whole or absent: atomic writes, links, durable renames, checksums, locks. Knows no format.

A rename is atomic only inside one file system and durable only once the folder is synced; both are done here, so that
nobody above has to remember.
"""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from knnlm.errors import Conflict, DatastoreError

CHUNK = 1 << 20
# no hard links here: the file system has none, forbids them, has too many to this file, or is another one
WITHOUT_LINKS = (errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


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


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A new file to write into, durable when the block ends without an error. Errors of the block itself pass."""
    with disk_errors(path):
        file = path.open("wb")
    try:
        yield file
        with disk_errors(path):
            file.flush()
            sync_file(file.fileno())
    finally:
        with disk_errors(path):  # what could not be written is tried once more
            file.close()


def share(source: Path, target: Path) -> None:
    """Make `target` a second name of the file `source`, or a copy where the file system refuses hard links.

    The content is durable as that of `source` is, the name once its folder is synced. Neither may be written into from
    now on. Raises DatastoreError, also when there is no `source`, or a `target`.
    """
    with disk_errors(target):
        try:
            os.link(source, target)
        except OSError as err:
            if err.errno not in WITHOUT_LINKS:
                raise
            with source.open("rb") as old, target.open("xb") as new:
                shutil.copyfileobj(old, new, CHUNK)
                new.flush()
                sync_file(new.fileno())


def discard(folder: Path) -> None:
    """Remove a folder that is of no use any more. What cannot be removed now stays: whoever calls this comes by again,
    and what was done before it is not undone because of it."""
    shutil.rmtree(folder, ignore_errors=True)


def sync_file(descriptor: int) -> None:
    """Write to the disk itself: on macOS plain fsync leaves the data in the drive's cache."""
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
    """Digest of the whole file, read once in chunks."""
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
