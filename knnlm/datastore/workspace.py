"""store/<domain>/.<version>.building/: a build in progress, owned by one process at a time, until it is published.

Besides the files that will be the version it holds `.build/`: the lock, build.json (what is being built, so that nobody
continues it as something else) and the records of finished parts.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from knnlm.datastore.corpus import Sources
from knnlm.datastore.files import disk_errors, locked, sync_folder, write_atomic
from knnlm.datastore.manifest import KeyDtype, ModelRecord, Record, WindowsRecord
from knnlm.errors import Conflict, DatastoreCorrupt

__all__ = ["Identity", "Workspace", "workspace"]


class Identity(Record):
    """What must not change while a build is continued."""

    model: ModelRecord
    key_function: str
    key_dim: int
    key_dtype: KeyDtype
    windows: WindowsRecord


class State(Record):
    """build.json. sources: None until the first phase is complete."""

    identity: Identity
    sources: Sources | None = None


class Workspace:
    def __init__(self, folder: Path, identity: Identity) -> None:
        """Raises Conflict, naming the field and both values, when `folder` was begun as something else."""
        self.folder = folder
        self.records = folder / ".build" / "parts"
        self._file = folder / ".build" / "build.json"
        with disk_errors(self.records):
            self.records.mkdir(exist_ok=True)
        self.state = self._load() or State(identity=identity)
        self._refuse_other(self.state.identity.model_dump(), identity.model_dump())
        self._save()

    def complete_sources(self, sources: Sources) -> None:
        """The first phase is done."""
        self.state = State(identity=self.state.identity, sources=sources)
        self._save()

    def check_sources(self, sha256: str) -> None:
        """Raises Conflict when the documents are not those of the first phase."""
        if self.state.sources is not None:
            self._refuse_other({"documents": self.state.sources.sha256}, {"documents": sha256})

    def publish(self, target: Path) -> None:
        """Rename to `target`: from now on it can be read. What only the build needed goes afterwards."""
        with disk_errors(target):
            for leftover in self.folder.glob(".*.tmp"):  # of a write that was killed
                leftover.unlink()
            sync_folder(self.folder)
            self.folder.rename(target)
            sync_folder(target.parent)
            shutil.rmtree(target / ".build")

    def _save(self) -> None:
        write_atomic(self._file, self.state.model_dump_json(indent=2).encode())

    def _load(self) -> State | None:
        try:
            return State.model_validate_json(self._file.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as err:
            raise DatastoreCorrupt(f"{self._file} is damaged; remove {self.folder} to build anew: {err}") from err

    def _refuse_other(self, begun: dict[str, Any], wanted: dict[str, Any]) -> None:  # Any: fields of several types
        for (name, old), (_, new) in zip(_flat(begun), _flat(wanted), strict=True):
            if old != new:
                raise Conflict(
                    f"{self.folder} was begun with {name} {old!r}, asked for is {new!r}: "
                    "continue it as it was begun, or remove the folder",
                    param=name,
                )


@contextmanager
def workspace(target: Path, identity: Identity) -> Iterator[Workspace]:
    """The building folder of the version `target`, made or continued, locked against other builders.

    Raises Conflict when the version is published, another process is building it, or it was begun as something else.
    """
    folder = target.with_name(f".{target.name}.building")
    lock = folder / ".build" / "lock"
    _refuse_published(target)
    with disk_errors(folder):
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    with locked(lock, wait=False, doing=f"building {target.name}"):
        _refuse_published(target)  # again: who had the lock may have published since
        yield Workspace(folder, identity)


def _refuse_published(target: Path) -> None:
    if target.exists():
        raise Conflict(
            f"version {target.name} of domain {target.parent.name} exists already: versions never change, "
            "build another one",
            param="version",
        )


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:  # Any: fields of several types
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
