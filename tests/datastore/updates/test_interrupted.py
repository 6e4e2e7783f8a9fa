"""Changes that are killed, or meet a full disk, at any moment; and what the same change makes of what they left."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from knnlm.datastore.catalog import Catalog
from knnlm.datastore.files import CHUNK, share
from knnlm.datastore.layout import KEYS, VALUES
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.progress import Progress
from knnlm.datastore.updates.documents import add
from knnlm.datastore.verify import verify
from knnlm.errors import DatastoreError, NotFound
from knnlm.messages import Document, ForwardRequest, ForwardResult
from knnlm.testing import ToyLanguageModel
from tests.datastore.growing import folder, forget, grow, listed, live, sound, toy_catalog
from tests.datastore.killing import ADDED, CHANGES, OPERATIONS, Killer
from tests.limits import file_size_limit

EXPECTED = {
    "add": ["0", "2", "3", "x", "a", "1"],
    "remove": ["1", "3", "x"],
    "compact": ["0", "1", "2", "x"],
}


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    with Killer() as process:
        yield process


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, bytes]]]:
    """For each change, a store to begin with, and the files of the version that it makes when nothing happens."""
    made = {}
    for name, change in CHANGES.items():
        store = tmp_path_factory.mktemp(name) / "store"
        catalog = toy_catalog(store)
        grow(catalog, [Document("x", "a text that was added before")])
        if name == "compact":
            forget(catalog, "3")
        done = tmp_path_factory.mktemp(name) / "done"
        shutil.copytree(store, done)
        made[name] = (store, contents(folder(Catalog(done), change(done))))
    return made


def contents(path: Path) -> dict[str, bytes]:
    """But for the manifest, which holds the time of day, and what an index that was stopped leaves for the next."""
    return {f.name: f.read_bytes() for f in path.iterdir() if f.name != "manifest.json" and f.name[0] != "."}


def all_contents(catalog: Catalog) -> dict[str, dict[str, bytes]]:
    return {version: contents(catalog.path("toy", version)) for version in catalog.versions("toy")}


def usable(path: Path) -> bool:
    """Sound, but for an index that was complete and not yet named: who indexes the version next removes it."""
    problems = [check for check in verify(path) if check.problem is not None]
    return all(check.name.endswith(".faiss") and check.problem == "is not listed in the manifest" for check in problems)


def repeated(store: Path, name: str, expected: dict[str, bytes]) -> None:
    """The store is as good as before or after the change; making it again gives what an unhindered one gives."""
    catalog = Catalog(store)
    before = [v for v in catalog.versions("toy") if v != catalog.current("toy")]
    assert all(usable(catalog.path("toy", version)) for version in catalog.versions("toy"))
    current = catalog.path("toy", catalog.current("toy") or "")
    if contents(current) == expected:  # killed after it was activated: there is nothing left to do, or only to tidy up
        if name == "remove":
            with pytest.raises(NotFound):
                CHANGES[name](store)
        else:
            CHANGES[name](store)
    else:
        made = CHANGES[name](store)
        assert contents(folder(catalog, made)) == expected
        # what was published, but not activated, is taken: not another one is made
        assert len(catalog.versions("toy")) == len({*before, current.name, made.version})
        assert made.version == f"v{len(catalog.versions('toy'))}"
    current = catalog.path("toy", catalog.current("toy") or "")
    assert (live(current), sound(current)) == (EXPECTED[name], True)
    assert listed(catalog) == ["CURRENT", *catalog.versions("toy")]


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_disk_operation_the_former_version_answers_and_the_same_change_continues(
    killer: Killer, whole: dict[str, tuple[Path, dict[str, bytes]]], tmp_path: Path, name: str, stride: int
) -> None:
    source, expected = whole[name]
    former = all_contents(Catalog(source))
    operations = 0
    while True:
        store = tmp_path / str(operations)
        shutil.copytree(source, store)
        if not killer.killed(store, name, operations):
            break
        left = all_contents(Catalog(store))
        assert {version: left[version] for version in former} == former
        repeated(store, name, expected)
        operations += stride
    assert operations >= 15
    assert contents(Catalog(store).path("toy", Catalog(store).current("toy") or "")) == expected


CHILD = """
import sys, time
from pathlib import Path
from tests.datastore.killing import ADDED
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.updates.documents import add
from knnlm.testing import ToyLanguageModel

class Slow(ToyLanguageModel):
    def forward(self, request):
        time.sleep(0.01)
        return super().forward(request)

catalog = Catalog(Path(sys.argv[1]))
print("begun", flush=True)
add(ADDED, Slow(), catalog, "toy", replace=True, activate=catalog.activate, batch_tokens=32, part_entries=10)
"""


def test_killed_at_any_moment_by_the_clock(whole: dict[str, tuple[Path, dict[str, bytes]]], tmp_path: Path) -> None:
    source, expected = whole["add"]
    rng = random.Random(0)
    store = tmp_path / "store"
    shutil.copytree(source, store)
    catalog = Catalog(store)
    for _ in range(4):  # one after another, over what the others left
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(store)], stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert child.stdout is not None
        with child, child.stdout:
            child.stdout.readline()
            time.sleep(rng.uniform(0, 0.08))
            child.send_signal(signal.SIGKILL)
        assert all(usable(catalog.path("toy", version)) for version in catalog.versions("toy"))
        if catalog.current("toy") != "v2":
            break
    else:
        repeated(store, "add", expected)


def test_a_kill_costs_no_part_that_was_finished(killer: Killer, tmp_path: Path) -> None:
    catalog = toy_catalog(tmp_path)
    operations = 0
    resumed: set[int] = set()
    while killer.killed(tmp_path, "add", operations):
        finished = len(list((tmp_path / "toy").glob(".add-*/.build/parts/*.json")))
        seen: list[Progress] = []

        class Once(BaseException):
            pass

        class Stopping(ToyLanguageModel):
            def forward(self, request: ForwardRequest) -> ForwardResult:
                raise Once(request)

        try:
            add(
                ADDED, Stopping(), catalog, "toy", replace=True, batch_tokens=64, part_entries=30,
                on_progress=seen.append,
            )  # fmt: skip
        except Once:
            parts = sum(1 for p in seen if p.phase == "encode")
            assert parts >= finished  # all of them were found before the model was asked for anything
            resumed.add(finished)
        else:
            break
        operations += 3
    assert len(resumed) > 1


@pytest.mark.parametrize("name", CHANGES)
def test_a_disk_that_is_full_at_any_operation_is_an_error_and_leaves_the_former_version(
    whole: dict[str, tuple[Path, dict[str, bytes]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source, expected = whole[name]
    former = all_contents(Catalog(source))
    left = sys.maxsize

    def failing(operation: str) -> None:
        original = getattr(os, operation)

        def full(*args: Any, **more: Any) -> Any:  # Any: whatever the original takes
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args, **more)

        monkeypatch.setattr(os, operation, full)

    for operation in OPERATIONS:
        if operation not in ("unlink", "rmdir"):  # these need no space
            failing(operation)
    operations = 0
    errors: list[str] = []
    while True:
        store = tmp_path / str(operations)
        shutil.copytree(source, store)
        left = operations
        try:
            made = CHANGES[name](store)
        except DatastoreError as err:
            errors.append(err.message)
        else:
            assert contents(folder(Catalog(store), made)) == expected
            if left >= 0:
                break
        left = sys.maxsize
        now = all_contents(Catalog(store))
        assert {version: now[version] for version in former} == former
        repeated(store, name, expected)
        operations += 5
    assert len(errors) > 2
    assert all("No space left on device" in message for message in errors)


@pytest.mark.parametrize("name", ["a", "a" * 3000])  # most bytes are of keys, or of the list of documents
def test_a_disk_that_is_full_at_any_size_is_an_error_of_ours(tmp_path: Path, name: str) -> None:
    catalog = toy_catalog(tmp_path)
    documents = [Document(name, ADDED[0].text)]
    size = 0
    errors: list[str] = []
    while True:
        try:
            with file_size_limit(size):
                made = add(documents, ToyLanguageModel(), catalog, "toy", part_entries=30)
            break
        except DatastoreError as err:
            errors.append(err.message)
        assert catalog.versions("toy") == ["v1"]
        size += 100
    assert len(errors) > 5
    assert all("File too large" in message for message in errors)
    assert sound(folder(catalog, made))


@pytest.mark.parametrize("name", [KEYS, VALUES])
def test_damaged_keys_of_a_finished_addition_are_made_again_and_never_in_place(tmp_path: Path, name: str) -> None:
    catalog = toy_catalog(tmp_path)

    def refuse(domain: str, version: str, parent: str) -> None:
        raise DatastoreError(f"no {domain} {version}")

    with pytest.raises(DatastoreError, match="no toy v2"):
        add(ADDED, ToyLanguageModel(), catalog, "toy", replace=True, activate=refuse)
    published = catalog.path("toy", "v2")
    whole = contents(published)
    written = {f.name: f.stat().st_mtime_ns for f in published.iterdir()}
    (space,) = (tmp_path / "toy").glob(".add-*")
    assert os.path.samefile(space / "keys.npy", published / "keys.1.npy")
    damaged = bytearray((space / name).read_bytes())
    damaged[-1] ^= 1
    (space / name).unlink()
    (space / name).write_bytes(damaged)
    made = add(ADDED, ToyLanguageModel(), catalog, "toy", replace=True, activate=catalog.activate)
    assert (made.version, contents(published)) == ("v2", whole)
    assert {f.name: f.stat().st_mtime_ns for f in published.iterdir()} == written
    assert sound(published)


def test_a_copy_that_cannot_be_finished_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "source").write_bytes(bytes(range(256)) * (2 * CHUNK // 256 + 1))
    share(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "source").read_bytes()
    with pytest.raises(DatastoreError, match=r"cannot write .*copy: File exists"):
        share(tmp_path / "source", tmp_path / "copy")
    with pytest.raises(DatastoreError, match=r"cannot write .*other: No such file"):
        share(tmp_path / "nowhere", tmp_path / "other")


def test_the_version_that_was_compacted_is_named_after_the_last(
    whole: dict[str, tuple[Path, dict[str, bytes]]], tmp_path: Path
) -> None:
    shutil.copytree(whole["compact"][0], tmp_path / "store")
    made = CHANGES["compact"](tmp_path / "store")
    manifest = Manifest.load(folder(Catalog(tmp_path / "store"), made))
    assert (manifest.format_version, manifest.parent, manifest.version) == (1, None, "v4")
