"""Files of a version against the sizes and sha256 in its manifest: one comparison, for verifying and for serving."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, get_args

from knnlm.datastore.layout import is_keys
from knnlm.datastore.manifest import FileRecord, Manifest
from knnlm.errors import DatastoreCorrupt, InvalidRequest

__all__ = ["Checksums", "file_problem", "require_unchanged"]

Checksums = Literal["none", "small", "all"]
KINDS: Final = get_args(Checksums)


def file_problem(file: Path, record: FileRecord) -> str | None:
    """What is wrong with `file`, with the found and the expected value; None when it is what the record says."""
    try:
        size = file.stat().st_size
        if size != record.bytes:
            return f"has {size} bytes, expected {record.bytes}"
        with file.open("rb", buffering=0) as opened:
            # into one buffer, hashed without the interpreter's lock: other threads go on
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as err:
        return f"cannot be read: {err.strerror}"
    return None if sha256 == record.sha256 else f"has sha256 {sha256}, expected {record.sha256}"


def require_unchanged(path: Path, manifest: Manifest, check: Checksums) -> None:
    """Read the files of the version in folder `path` and compare them with its manifest.

    check: "all" of them, "small" = all but the keys, whose values cannot break what reads them and which are most of
    the bytes, or "none". Raises DatastoreCorrupt for the first that differs, with what was found and what was expected.
    """
    if check not in KINDS:
        raise InvalidRequest(f"check must be one of {', '.join(KINDS)}, got {check!r}", param="check")
    for name, record in sorted(_chosen(manifest.files, check).items()):
        problem = file_problem(path / name, record)
        if problem is not None:
            raise DatastoreCorrupt(f"{path / name} {problem}")


def _chosen(files: Mapping[str, FileRecord], check: Checksums) -> Mapping[str, FileRecord]:
    if check == "all":
        return files
    return {name: record for name, record in files.items() if check == "small" and not is_keys(name)}
