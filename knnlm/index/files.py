"""Files of indexes in a version's folder: named by what is in them, so that no name ever means two contents."""

from pathlib import Path

from knnlm.datastore.files import disk_errors, sha256_of, sync_file, sync_folder
from knnlm.datastore.layout import FileRecord
from knnlm.datastore.manifest import Manifest

__all__ = ["named", "remove_unnamed"]


def named(building: Path, suffix: str = "faiss") -> dict[str, FileRecord]:
    """Make the file durable under a name that says what is in it."""
    sha256 = sha256_of(building)
    name = f"index.{sha256[:16]}.{suffix}"
    with disk_errors(building):
        with building.open("rb") as file:
            sync_file(file.fileno())
        record = FileRecord(bytes=building.stat().st_size, sha256=sha256)
        building.rename(building.with_name(name))
        sync_folder(building.parent)
    return {name: record}


def remove_unnamed(path: Path) -> None:
    """Remove what no index of the version in folder `path` names any more."""
    manifest = Manifest.load(path)
    for former in (*path.glob("index.*.faiss"), *path.glob("index.*.trained")):
        if former.name not in manifest.files:
            former.unlink()
