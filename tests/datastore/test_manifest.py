import json
import threading
from datetime import UTC
from pathlib import Path

import pytest

from knnlm.datastore.manifest import FileRecord, IndexRecord, Manifest, with_index, with_tuning
from knnlm.errors import DatastoreCorrupt, DatastoreIncomplete, InvalidRequest
from knnlm.messages import Tuning
from knnlm.testing import ToyLanguageModel, toy_datastore

TUNING = Tuning(temperature=2.5, lmbda=0.25, k=64, lm_perplexity=20.0, knn_perplexity=15.5, tokens=1000, documents=3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return toy_datastore(tmp_path)


def test_manifest_says_what_the_version_is(path: Path) -> None:
    manifest, info = Manifest.load(path), ToyLanguageModel().info
    assert (manifest.domain, manifest.version, manifest.format_version) == ("toy", "v1", 1)
    assert manifest.model.weights_sha256 == info.weights_sha256
    assert (manifest.windows.context_length, manifest.windows.min_context) == (32, 16)
    assert manifest.created.tzinfo == UTC
    assert manifest.index == IndexRecord(recipe="flat")
    assert manifest.tuning is None
    assert set(manifest.files) == {f.name for f in path.iterdir()} - {"manifest.json"}


def test_saved_and_loaded_is_equal(path: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(path)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert (tmp_path / "manifest.json").read_bytes() == (path / "manifest.json").read_bytes()


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(DatastoreCorrupt, match="is missing: expected the manifest"):
        Manifest.load(tmp_path / "nowhere")


def test_building_folder_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(DatastoreIncomplete, match=r"\.v1\.building is not published"):
        Manifest.load(tmp_path / ".v1.building")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "holds list, expected an object"),
        ("{}", "has format version None, this program reads 1"),
        ('{"format_version": 2}', "has format version 2, this program reads 1"),
        ('{"format_version": 1}', "was changed"),
    ],
)
def test_what_is_no_manifest_is_refused(path: Path, content: str, message: str) -> None:
    (path / "manifest.json").write_text(content)
    with pytest.raises(DatastoreCorrupt, match=message) as caught:
        Manifest.load(path)
    assert str(path) in caught.value.message


def test_changed_field_is_noticed(path: Path) -> None:
    file = path / "manifest.json"
    fields = json.loads(file.read_text())
    fields["entries"] += 1
    file.write_text(json.dumps(fields, indent=2) + "\n")
    with pytest.raises(DatastoreCorrupt, match="was changed: its content has checksum"):
        Manifest.load(path)


def test_changed_layout_is_noticed(path: Path) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    with pytest.raises(DatastoreCorrupt, match="exactly the bytes that were written"):
        Manifest.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("surprise", 1), ("entries", -1), ("key_dtype", "float64"),
     ("files", {"../keys.npy": {"bytes": 1, "sha256": "0" * 64}}),
     ("index", {"recipe": "ivf4", "file": "index.faiss", "parameters": {}})],
)  # fmt: skip
def test_fields_are_validated_even_with_a_good_checksum(path: Path, name: str, value: object) -> None:
    from knnlm.datastore.manifest import _checksum

    file = path / "manifest.json"
    fields = json.loads(file.read_text())
    del fields["checksum"]
    fields[name] = value
    file.write_text(json.dumps({**fields, "checksum": _checksum(fields)}, indent=2) + "\n")
    with pytest.raises(DatastoreCorrupt, match="is not a manifest"):
        Manifest.load(path)


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
