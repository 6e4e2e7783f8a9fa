"""Targets that were stopped, or whose parts are damaged, are continued to the same bytes."""

from pathlib import Path

import pytest

from knnlm.datastore.reader import Datastore
from knnlm.errors import Conflict
from knnlm.index.searcher import Searcher
from knnlm.memory.targets import Targets
from tests.memory.making import Killed, files, make, store

__all__ = ["store"]


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What it holds is how many searches are left before one raises."""
    left = [1 << 30]
    search = Searcher.search

    def counted(self: Searcher, request: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return search(self, request)  # type: ignore[arg-type]

    monkeypatch.setattr(Searcher, "search", counted)
    return left


def test_stopped_at_any_part_it_continues_to_the_same_bytes(store: Path, tmp_path: Path, dying: list[int]) -> None:
    make(store, tmp_path / "whole")
    expected = files(tmp_path / "whole")
    parts = -(-Datastore.open(store / "toy/v1").entries // 100)
    for done in range(parts):
        out = tmp_path / f"stopped{done}"
        dying[0] = done
        with pytest.raises(Killed):
            make(store, out)
        assert not out.exists()
        dying[0] = parts - done  # not one more than is left to do
        make(store, out)
        assert files(out) == expected
        assert Targets.open(out, check="all").manifest.shape == Targets.open(tmp_path / "whole").manifest.shape


def test_a_damaged_part_is_made_again(store: Path, tmp_path: Path, dying: list[int]) -> None:
    make(store, tmp_path / "whole")
    dying[0] = 3
    with pytest.raises(Killed):
        make(store, tmp_path / "out")
    work = tmp_path / ".out.building"
    data = bytearray((work / "part-00001.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (work / "part-00001.npz").write_bytes(data)
    (work / "part-00000.npz").write_bytes(b"")
    dying[0] = 1 << 30
    make(store, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_stopped_while_parts_are_put_together_it_continues(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(store, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("knnlm.memory.making.save", lambda record, file: _kill(record, file))
        with pytest.raises(Killed):
            make(store, tmp_path / "out")
    make(store, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            make(store, tmp_path / "late")
    make(store, tmp_path / "late")
    assert files(tmp_path / "late") == files(tmp_path / "whole")


def _kill(record: object, file: Path) -> None:
    from knnlm.memory import manifest

    if file.name == "targets.json":
        raise Killed
    manifest.save(record, file)  # type: ignore[arg-type]


def test_targets_are_not_continued_with_other_settings(store: Path, tmp_path: Path, dying: list[int]) -> None:
    dying[0] = 1
    with pytest.raises(Killed):
        make(store, tmp_path / "out")
    with pytest.raises(Conflict, match=r"begun with temperature 2\.0, asked for is 3\.0"):
        make(store, tmp_path / "out", temperature=3.0)
    with pytest.raises(Conflict, match="begun with exclude 'entry', asked for is 'document'"):
        make(store, tmp_path / "out", exclude="document")
    dying[0] = 1 << 30
    make(store, tmp_path / "out")
    with pytest.raises(Conflict, match="out exists already"):
        make(store, tmp_path / "out")
