"""What may change in a published version, and nothing else with it."""

import threading
from pathlib import Path

import pytest

from knnlm.datastore.layout import FileRecord
from knnlm.datastore.manifest import IndexRecord, Manifest
from knnlm.datastore.updates.revise import with_default_index, with_index, with_tuning, without_index
from knnlm.errors import Conflict, InvalidRequest
from knnlm.testing import toy_datastore
from knnlm.tuning_records import Tuning
from tests.datastore.test_manifest import GOLDEN

TUNING = Tuning(temperature=2.5, lmbda=0.25, k=64, lm_perplexity=20.0, knn_perplexity=15.5, tokens=1000, documents=3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return toy_datastore(tmp_path)


def test_tuning_is_stored_and_replaced(path: Path) -> None:
    before = Manifest.load(path)
    with_tuning(path, TUNING)
    after = Manifest.load(path)
    assert after.tuning is not None
    assert after.tuning.message() == TUNING
    assert after.model_copy(update={"tuning": None}) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0.0), ("temperature", float("nan")), ("lmbda", 1.5), ("k", 0), ("lm_perplexity", float("inf"))],
)
def test_unusable_tuning_is_refused(path: Path, name: str, value: float) -> None:
    before = (path / "manifest.json").read_bytes()
    with pytest.raises(InvalidRequest, match=name):
        with_tuning(path, Tuning(**{**TUNING.__dict__, name: value}))
    assert (path / "manifest.json").read_bytes() == before


def test_index_replaces_the_former_and_keeps_tuning(path: Path) -> None:
    with_tuning(path, TUNING)
    first, second = (FileRecord(bytes=1, sha256=digit * 64) for digit in "12")
    with_index(path, IndexRecord(recipe="ivf4", file="a.faiss", parameters={"nprobe": 2}), {"a.faiss": first})
    with_index(path, IndexRecord(recipe="ivf8", file="b.faiss"), {"b.faiss": second})
    manifest = Manifest.load(path)
    assert manifest.index == IndexRecord(recipe="ivf8", file="b.faiss")
    assert "a.faiss" not in manifest.files
    assert manifest.files["b.faiss"] == second
    assert manifest.tuning is not None


def recipes(path: Path) -> list[str]:
    return [index.recipe for index in Manifest.load(path).indexes]


def add(path: Path, recipe: str, file: str, *, beside: bool = True) -> None:
    record = FileRecord(bytes=1, sha256=file[0] * 64)
    with_index(path, IndexRecord(recipe=recipe, file=file), {file: record}, beside=beside)


def test_file_of_before_there_were_several_indexes_is_read_and_written_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(GOLDEN)
    manifest = Manifest.load(tmp_path)
    assert manifest.indexes == (manifest.index,)
    assert manifest.serialized().decode() == GOLDEN
    add(tmp_path, "ivf8", "b.faiss")
    assert "other_indexes" in (tmp_path / "manifest.json").read_text()
    without_index(tmp_path, "ivf8")
    assert (tmp_path / "manifest.json").read_text() == GOLDEN


def test_indexes_beside_each_other(path: Path) -> None:
    add(path, "ivf4", "a.faiss", beside=False)
    add(path, "ivf8", "b.faiss")
    add(path, "ivf16", "c.faiss")
    assert recipes(path) == ["ivf4", "ivf8", "ivf16"]
    assert {"a.faiss", "b.faiss", "c.faiss"} <= Manifest.load(path).files.keys()
    add(path, "ivf8", "d.faiss")
    assert sorted(recipes(path)) == ["ivf16", "ivf4", "ivf8"]
    assert Manifest.load(path).index.recipe == "ivf4"
    assert "b.faiss" not in Manifest.load(path).files
    add(path, "ivf16", "e.faiss", beside=False)  # in place of the default, and of its own former file
    assert recipes(path) == ["ivf16", "ivf8"]
    assert {name for name in Manifest.load(path).files if name.endswith("faiss")} == {"d.faiss", "e.faiss"}


def test_default_is_built_beside_itself(path: Path) -> None:
    add(path, "ivf4", "a.faiss", beside=False)
    add(path, "ivf4", "b.faiss")
    assert recipes(path) == ["ivf4"]
    assert Manifest.load(path).index.file == "b.faiss"


def test_index_is_found_by_its_recipe(path: Path) -> None:
    add(path, "ivf4", "a.faiss", beside=False)
    add(path, "ivf8", "b.faiss")
    manifest = Manifest.load(path)
    assert manifest.index_of(None) == manifest.index_of("ivf4") == manifest.index
    assert manifest.index_of("ivf8").file == "b.faiss"
    assert manifest.index_of("flat") == IndexRecord(recipe="flat")
    with pytest.raises(InvalidRequest, match="has no index 'ivf9': it has flat, ivf4, ivf8"):
        manifest.index_of("ivf9")


def test_another_default_keeps_all(path: Path) -> None:
    add(path, "ivf4", "a.faiss", beside=False)
    add(path, "ivf8", "b.faiss")
    with_default_index(path, "ivf8")
    assert recipes(path) == ["ivf8", "ivf4"]
    with_default_index(path, "flat")
    assert recipes(path) == ["flat", "ivf8", "ivf4"]
    assert {"a.faiss", "b.faiss"} <= Manifest.load(path).files.keys()
    with pytest.raises(InvalidRequest, match="has no index 'ivf9'"):
        with_default_index(path, "ivf9")


def test_index_is_taken_away_unless_it_is_the_default(path: Path) -> None:
    add(path, "ivf4", "a.faiss", beside=False)
    add(path, "ivf8", "b.faiss")
    with pytest.raises(Conflict, match="ivf4 is the default index"):
        without_index(path, "ivf4")
    for unknown in ("flat", "ivf9"):
        with pytest.raises(InvalidRequest, match=f"has no index '{unknown}' to remove: it has ivf4, ivf8"):
            without_index(path, unknown)
    without_index(path, "ivf8")
    assert recipes(path) == ["ivf4"]
    assert "b.faiss" not in Manifest.load(path).files


def test_concurrent_changes_are_both_kept(path: Path) -> None:
    record = FileRecord(bytes=1, sha256="1" * 64)

    def index() -> None:
        for i in range(10):
            with_index(path, IndexRecord(recipe=f"ivf{i + 1}", file="a.faiss"), {"a.faiss": record})

    def tune() -> None:
        for i in range(10):
            with_tuning(path, Tuning(**{**TUNING.__dict__, "k": i + 1}))

    threads = [threading.Thread(target=index), threading.Thread(target=tune)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    manifest = Manifest.load(path)
    assert manifest.index.recipe == "ivf10"
    assert manifest.tuning is not None
    assert manifest.tuning.k == 10
