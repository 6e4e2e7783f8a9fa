"""Builds that are killed, and what the same command makes of what they left."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.files import locked
from knnlm.datastore.reader import Datastore
from knnlm.datastore.verify import verify
from knnlm.errors import Conflict, DatastoreCorrupt, DatastoreError, DatastoreIncomplete
from knnlm.messages import Document, ForwardRequest, ForwardResult
from knnlm.testing import TEXTS, ToyLanguageModel
from tests.limits import file_size_limit

PART = 40  # entries: several parts, some of several windows
DOCUMENTS = [Document(str(i), text) for i, text in enumerate(TEXTS)]


class Killed(BaseException):
    """Like KeyboardInterrupt: nothing in a build may catch it."""


class Dying(ToyLanguageModel):
    """Dies at the given call."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls
        self.tokens = 0

    def forward(self, request: ForwardRequest) -> ForwardResult:
        if self.left == 0:
            raise Killed
        self.left -= 1
        self.tokens += sum(len(t) for t in request.tokens)
        return super().forward(request)


def run(store: Path, lm: ToyLanguageModel, documents: list[Document] | None = None, **settings: object) -> Path:
    wanted = {"batch_tokens": 32, "part_entries": PART, **settings}
    return build(DOCUMENTS if documents is None else documents, lm, Catalog(store), "toy", **wanted)  # type: ignore[arg-type]


def contents(path: Path) -> dict[str, bytes]:
    """But for the manifest, which holds the time of day, and what a build leaves that is killed after publishing."""
    return {f.name: f.read_bytes() for f in path.iterdir() if f.name not in ("manifest.json", ".build")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """The files of an uninterrupted build, and how many calls of the model it takes."""
    lm = Dying(10_000)
    path = run(tmp_path_factory.mktemp("whole"), lm)
    return contents(path), 10_000 - lm.left


def test_killed_at_any_call_it_continues_to_the_same_bytes(whole: tuple[dict[str, bytes], int], tmp_path: Path) -> None:
    files, calls = whole
    largest_part = (PART + 32) // 16 + 4  # windows, one a call
    for call in range(0, calls, 3):
        store = tmp_path / str(call)
        with pytest.raises(Killed):
            run(store, Dying(call))
        assert Catalog(store).domains() == []
        with pytest.raises(DatastoreIncomplete):
            Datastore.open(store / "toy/.v1.building")
        second = Dying(10_000)
        path = run(store, second)
        assert contents(path) == files
        repeated = call + (10_000 - second.left) - calls
        assert repeated <= largest_part
    assert all(check.problem is None for check in verify(path))


def test_killed_at_every_step_it_never_computes_more_than_one_part_again(
    whole: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    files, calls = whole
    total = 0
    while True:
        lm = Dying(5)  # enough for any one part, hardly for two
        try:
            path = run(tmp_path, lm)
            break
        except Killed:
            total += 1
            assert total < calls
    assert contents(path) == files


def test_killed_while_tokenizing_it_starts_that_again(whole: tuple[dict[str, bytes], int], tmp_path: Path) -> None:
    def dying() -> Iterator[Document]:
        yield from DOCUMENTS[:2]
        raise Killed

    with pytest.raises(Killed):
        build(dying(), ToyLanguageModel(), Catalog(tmp_path), "toy", part_entries=PART, batch_tokens=32)
    assert contents(run(tmp_path, ToyLanguageModel())) == whole[0]


def test_killed_at_any_disk_operation_it_continues_to_the_same_bytes(
    whole: tuple[dict[str, bytes], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 0

    def dying(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def operation(*args: Any) -> Any:  # Any: whatever the original takes
            nonlocal left
            left -= 1
            if left < 0:
                if name == "pwrite":  # in the middle of writing
                    original(args[0], args[1][: len(args[1]) // 2], args[2])
                raise Killed
            return original(*args)

        monkeypatch.setattr(owner, name, operation)

    for owner, name in ((os, "fsync"), (os, "pwrite"), (Path, "rename"), (Path, "replace")):
        dying(owner, name)
    operations = 0
    while True:
        store = tmp_path / str(operations)
        left = operations
        try:
            run(store, ToyLanguageModel(), part_entries=150, batch_tokens=4096)
            break
        except Killed:
            left = sys.maxsize
        if Catalog(store).domains():  # killed after publishing: what can be read is whole
            with pytest.raises(Conflict, match="exists already"):
                build(DOCUMENTS, ToyLanguageModel(), Catalog(store), "toy", version="v1")
        else:
            run(store, ToyLanguageModel(), part_entries=150, batch_tokens=4096)
        assert contents(store / "toy/v1") == whole[0]
        assert all(check.problem is None for check in verify(store / "toy/v1"))
        operations += 1
    assert operations > 25


CHILD = """
import sys, time
from pathlib import Path
from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.text import Document
from knnlm.testing import TEXTS, ToyLanguageModel

class Slow(ToyLanguageModel):
    def forward(self, request):
        time.sleep(0.02)
        return super().forward(request)

build([Document(str(i), text) for i, text in enumerate(TEXTS)], Slow(), Catalog(Path(sys.argv[1])), "toy",
      batch_tokens=32, part_entries=40, on_progress=lambda p: print(p.phase, p.entries_done, flush=True))
"""


def test_sigkill_costs_at_most_one_part(whole: tuple[dict[str, bytes], int], tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child, child.stdout:
        done = 0
        while done < 2 * PART:
            phase, entries = child.stdout.readline().split()
            done = int(entries) if phase == "encode" else 0
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert Catalog(tmp_path).domains() == []
    resumed: list[int] = []
    path = build(
        DOCUMENTS, ToyLanguageModel(), Catalog(tmp_path), "toy", batch_tokens=32, part_entries=PART,
        on_progress=lambda p: resumed.append(p.entries_resumed),
    )  # fmt: skip
    assert max(resumed) >= done
    assert contents(path) == whole[0]


def test_damaged_part_is_made_again(whole: tuple[dict[str, bytes], int], tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, Dying(whole[1] - 1))
    building = tmp_path / "toy/.v1.building"
    for name, offset in (("keys.npy", 200), ("values.npy", 600)):
        data = bytearray((building / name).read_bytes())
        data[offset] ^= 1
        (building / name).write_bytes(bytes(data))
    (building / ".build/parts/00003.json").write_text("{")
    assert contents(run(tmp_path, ToyLanguageModel())) == whole[0]


def test_other_part_size_still_gives_the_same_bytes(whole: tuple[dict[str, bytes], int], tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, Dying(whole[1] // 2))
    assert contents(run(tmp_path, ToyLanguageModel(), part_entries=70)) == whole[0]


@pytest.mark.parametrize(
    ("lm", "settings", "message"),
    [
        (ToyLanguageModel(seed=1), {}, r"model\.weights_sha256 '\w{64}', asked for is '\w{64}'"),
        (ToyLanguageModel(key_dim=8), {}, r"model\.weights_sha256"),
        (ToyLanguageModel(), {"key_dtype": "float32"}, "key_dtype 'float16', asked for is 'float32'"),
        (ToyLanguageModel(), {"context_length": 30, "min_context": 16}, r"windows\.context_length 32, asked for is 30"),
        (ToyLanguageModel(), {"min_context": 3}, r"windows\.min_context 16, asked for is 3"),
    ],
)
def test_build_is_not_continued_as_another(
    tmp_path: Path, lm: ToyLanguageModel, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(Killed):
        run(tmp_path, Dying(3))
    with pytest.raises(Conflict, match=message):
        run(tmp_path, lm, DOCUMENTS, **settings)


def test_build_is_not_continued_in_another_dtype(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, Dying(3))
    half = ToyLanguageModel()
    half.info = dataclasses.replace(half.info, dtype="bfloat16")
    with pytest.raises(Conflict, match=r"model\.dtype 'float32', asked for is 'bfloat16'"):
        run(tmp_path, half)


def test_build_is_not_continued_with_another_key_function(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, Dying(3))
    lm = ToyLanguageModel()
    lm.info = dataclasses.replace(lm.info, key_function="other")
    with pytest.raises(Conflict, match="key_function 'toy', asked for is 'other'"):
        run(tmp_path, lm)


@pytest.mark.parametrize(
    "documents", [DOCUMENTS[:3], DOCUMENTS[::-1], [*DOCUMENTS[:3], Document("other", TEXTS[3])], [Document("", "")]]
)
def test_build_is_not_continued_with_other_documents(tmp_path: Path, documents: list[Document]) -> None:
    with pytest.raises(Killed):
        run(tmp_path, Dying(3))
    with pytest.raises(Conflict, match="was begun with documents"):
        run(tmp_path, ToyLanguageModel(), documents)


def test_damaged_build_state_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, Dying(3))
    (tmp_path / "toy/.v1.building/.build/build.json").write_text("{}")
    with pytest.raises(DatastoreCorrupt, match=r"build\.json is damaged; remove"):
        run(tmp_path, ToyLanguageModel())


def test_two_builders_at_once_are_refused(tmp_path: Path) -> None:
    refused: list[str] = []

    class Intruding(ToyLanguageModel):
        def forward(self, request: ForwardRequest) -> ForwardResult:
            with pytest.raises(Conflict) as caught:
                run(tmp_path, ToyLanguageModel())
            refused.append(caught.value.message)
            return super().forward(request)

    run(tmp_path, Intruding())
    assert "another process is building v1" in refused[0]


def test_lock_is_released_after_an_error(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with pytest.raises(Killed), locked(tmp_path / "lock", wait=False, doing="testing"):
        raise Killed
    with locked(tmp_path / "lock", wait=False, doing="testing"), pytest.raises(Conflict, match="is testing"):
        locked(tmp_path / "lock", wait=False, doing="testing").__enter__()


def test_full_disk_is_an_error_that_names_the_file_and_the_build_continues(
    whole: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    refused = pytest.raises(DatastoreError, match=r"cannot write .*keys\.npy: File too large")
    with refused, file_size_limit(5000):  # keys.npy has 9408 bytes
        run(tmp_path, ToyLanguageModel())
    assert Catalog(tmp_path).domains() == []
    assert contents(run(tmp_path, ToyLanguageModel())) == whole[0]


def test_disk_that_fills_up_while_keys_are_written(
    whole: tuple[dict[str, bytes], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = os.pwrite, 0

    def full(*args: Any) -> int:  # Any: whatever pwrite takes
        nonlocal calls
        calls += 1
        if calls == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DatastoreError, match=r"cannot write .*\.npy: No space left on device"):
        run(tmp_path, ToyLanguageModel())
    assert contents(run(tmp_path, ToyLanguageModel())) == whole[0]
