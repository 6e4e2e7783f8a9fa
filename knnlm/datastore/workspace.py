"""A folder that keys are made in, owned by one process at a time: what was finished stays when the process dies.

store/<domain>/.<version>.building/ is a build, and becomes the version; .add-<digest>.building/ is documents that are
being added (updates/documents.py). Besides the files that will be published it holds `.build/`: the lock, build.json
(what is being made, so that nobody continues it as something else) and the records of finished parts.
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from knnlm.datastore.corpus import Sources
from knnlm.datastore.files import discard, disk_errors, locked, sync_folder, write_atomic
from knnlm.datastore.layout import BUILD_FOLDER, FileName, FileRecord, Record
from knnlm.datastore.manifest import KeyDtype, ModelRecord, WindowsRecord
from knnlm.errors import Conflict, DatastoreCorrupt

BUILDING = ".building"  # how the names of all of them end


class Identity(Record):
    """What must not change while a build is continued."""

    model: ModelRecord
    key_function: str
    key_dim: int
    key_dtype: KeyDtype
    windows: WindowsRecord


class State(Record):
    """build.json. sources: None until the first phase is complete. files: all of them, once keys need no more work."""

    identity: Identity
    sources: Sources | None = None
    files: dict[FileName, FileRecord] | None = None


class Workspace:
    def __init__(self, folder: Path, identity: Identity) -> None:
        """Raises Conflict, naming the field and both values, when `folder` was begun as something else."""
        self.folder = folder
        self.records = folder / BUILD_FOLDER / "parts"
        self._file = folder / BUILD_FOLDER / "build.json"
        with disk_errors(self.records):
            self.records.mkdir(exist_ok=True)
        self.state = self._load() or State(identity=identity)
        self._refuse_other(self.state.identity.model_dump(), identity.model_dump())
        self._save()

    def complete_sources(self, sources: Sources) -> None:
        """The first phase is done."""
        self.state = State(identity=self.state.identity, sources=sources)
        self._save()

    def complete_files(self, names: Sequence[str]) -> dict[str, FileRecord]:
        """All is done: from now on these files may be linked to, and are not written into any more."""
        files = {name: FileRecord.of(self.folder / name) for name in names}
        self.state = self.state.model_copy(update={"files": files})
        self._save()
        return files

    def completed_files(self) -> dict[str, FileRecord] | None:
        """What an earlier run completed, None when none did, or when the files are not those any more.

        Costs one reading of them. Those that are not what they were are removed: a version may have them by a link, so
        that work on them must not go on in place.
        """
        files = self.state.files
        if files is None:
            return None
        wrong = [name for name, record in files.items() if record.problem(self.folder / name) is not None]
        if not wrong:
            return dict(files)
        self.state = self.state.model_copy(update={"files": None})
        self._save()
        with disk_errors(self.folder):
            for name in files:
                (self.folder / name).unlink(missing_ok=True)
        return None

    def check_sources(self, sha256: str) -> None:
        """Raises Conflict when the documents are not those of the first phase."""
        if self.state.sources is not None:
            self._refuse_other({"documents": self.state.sources.sha256}, {"documents": sha256})

    def abandon(self) -> None:
        """Remove the folder, and the domain's when that holds nothing else."""
        discard(self.folder)
        with contextlib.suppress(OSError):  # not empty
            self.folder.parent.rmdir()

    def publish(self, target: Path) -> None:
        """Rename to `target`: from now on it can be read. What only the build needed goes afterwards."""
        with disk_errors(target):
            for leftover in self.folder.glob(".*.tmp"):  # left by a write that was killed
                leftover.unlink()
            sync_folder(self.folder)
            self.folder.rename(target)
            sync_folder(target.parent)
            shutil.rmtree(target / BUILD_FOLDER)

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
    folder = target.with_name(f".{target.name}{BUILDING}")
    _refuse_published(target)
    with disk_errors(folder):
        target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent, wait=True, doing="changing the domain"):  # a change takes no name that is being built
        _refuse_published(target)
        _prepare(folder)
    with working_in(folder, identity, doing=f"building {target.name}") as space:
        _refuse_published(target)  # again: the former holder of the lock may have published
        yield space


@contextmanager
def working_in(folder: Path, identity: Identity, *, doing: str) -> Iterator[Workspace]:
    """The workspace in `folder`, made or continued, locked. Raises Conflict when another process is `doing` it, or when
    it was begun as something else."""
    _prepare(folder)
    with locked(_lock(folder), wait=False, doing=doing):
        yield Workspace(folder, identity)


def _prepare(folder: Path) -> None:
    lock = _lock(folder)
    with disk_errors(folder):
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()


def _lock(folder: Path) -> Path:
    return folder / BUILD_FOLDER / "lock"


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
