import json
from datetime import UTC
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from knnlm.datastore.manifest import IndexRecord, Manifest
from knnlm.datastore.tuning import TuningRecord
from knnlm.errors import Conflict, DatastoreCorrupt, DatastoreIncomplete
from knnlm.messages import Document
from knnlm.options import SearchOptions
from knnlm.testing import ToyLanguageModel, toy_datastore
from knnlm.tuning_records import RuleQuality, SearchQuality, Tuning
from tests.grown import grow

# As the first program of this format version wrote it, when a version had one index
GOLDEN = """\
{
  "format_version": 1,
  "domain": "law",
  "version": "v3",
  "created": "2026-01-02T03:04:05Z",
  "model": {
    "model_id": "pocket",
    "architecture": "llama",
    "weights_sha256": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "tokenizer_sha256": "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
    "vocab_size": 4096
  },
  "key_function": "ffn_input",
  "windows": {
    "context_length": 512,
    "min_context": 256
  },
  "key_dim": 256,
  "key_dtype": "float16",
  "entries": 1000,
  "documents": 3,
  "tokens": 1003,
  "index": {
    "recipe": "ivf4,sq8",
    "file": "index.0123.faiss",
    "parameters": {
      "nprobe": 2
    }
  },
  "files": {
    "index.0123.faiss": {
      "bytes": 5,
      "sha256": "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
    }
  },
  "tuning": {
    "temperature": 2.5,
    "lmbda": 0.25,
    "k": 64,
    "lm_perplexity": 20.0,
    "knn_perplexity": 15.5,
    "tokens": 1000,
    "documents": 3
  },
  "checksum": "37eda43e0d3acafaf84b91cb7d1ef33e078c80a4b0c3414a4cd205ee4d66456d"
}
"""


def changed(path: Path, changes: dict[str, Any]) -> None:  # Any: of the fields' types
    """Write other fields into a manifest, with the checksum that fits them."""
    from knnlm.datastore.manifest import _checksum

    file = path / "manifest.json"
    fields = json.loads(file.read_text())
    del fields["checksum"]
    fields |= changes
    file.write_text(json.dumps({**fields, "checksum": _checksum(fields)}, indent=2) + "\n")


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
        ("{}", "has format version None, this program reads 1, 2 and 3"),
        ('{"format_version": 4}', "has format version 4, this program reads 1, 2 and 3"),
        ('{"format_version": 2}', "was changed"),
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
     ("index", {"recipe": "ivf4", "file": "index.faiss", "parameters": {}}),
     ("other_indexes", [{"recipe": "ivf4", "file": "index.faiss", "parameters": {}}]),
     ("other_indexes", [{"recipe": "flat", "file": None, "parameters": {}}])],
)  # fmt: skip
def test_fields_are_validated_even_with_a_good_checksum(path: Path, name: str, value: object) -> None:
    changed(path, {name: value})
    with pytest.raises(DatastoreCorrupt, match="is not a manifest"):
        Manifest.load(path)


def test_file_of_before_versions_could_grow_is_written_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(GOLDEN)
    manifest = Manifest.load(tmp_path)
    assert manifest.serialized().decode() == GOLDEN
    assert (manifest.base_entries, manifest.live_entries, manifest.live_documents) == (1000, 1000, 3)


@pytest.fixture
def grown(path: Path) -> Path:
    """(290, 4, 294) entries, documents and tokens; then (5, 1, 6) and (3, 2, 5); documents 1 and 5, the latter with
    one entry, are removed."""
    added = [[Document("a", "a cat")], [Document("b", "ab"), Document("c", "c")]]
    return grow(path, ToyLanguageModel(), added, [1, 6], numbers=[2, 7])


def test_version_that_has_grown_counts_base_all_and_what_is_live(grown: Path) -> None:
    manifest = Manifest.load(grown)
    assert (manifest.format_version, manifest.parent) == (2, "v1")
    assert (manifest.base_entries, manifest.base_documents, manifest.base_tokens) == (290, 4, 294)
    assert (manifest.entries, manifest.documents, manifest.tokens) == (298, 7, 305)
    assert (manifest.live_entries, manifest.live_documents) == (298 - 105 - 1, 5)
    assert manifest.serialized() == (grown / "manifest.json").read_bytes()
    names = {"keys.7.npy", "values.7.npy", "tokens.7.npy", "documents.7.jsonl", "removed.npy"}
    assert names <= manifest.files.keys()


def segment(number: int = 2, **fields: int) -> dict[str, int]:
    return {"number": number, "entries": 5, "documents": 1, "tokens": 6, **fields}


OTHER = segment(7, entries=3, documents=2, tokens=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, "format version 1 with 2 segments"),
        ({"segments": [], "removed": None}, "format version 2 with 0 segments"),
        ({"segments": [OTHER, segment()]}, r"numbered \[7, 2\], expected ascending"),
        ({"segments": [segment(), segment()]}, r"numbered \[2, 2\], expected ascending"),
        ({"segments": [segment(0), OTHER]}, "segments.0.number: .*greater than or equal to 1"),
        ({"segments": [segment(3), OTHER]}, r"keys\.3\.npy is not among files"),
        ({"segments": [segment(entries=-1), OTHER]}, "segments.0.entries"),
        ({"segments": [segment(documents=0), OTHER]}, "segments.0.documents"),
        ({"segments": [segment(surprise=1), OTHER]}, "segments.0.surprise"),
        ({"segments": [segment(entries=296), OTHER]}, "entries are 298, fewer than in the segments"),
        ({"segments": [segment(documents=6), OTHER]}, "documents are 7, fewer than in the segments"),
        ({"segments": [segment(tokens=301), OTHER]}, "tokens are 305, fewer than in the segments"),
        ({"removed": {"documents": 0, "entries": 0}}, "removed.documents"),
        ({"removed": {"documents": 1, "entries": -1}}, "removed.entries"),
        ({"removed": {"documents": 8, "entries": 1}}, "documents are 7, fewer than .* among the removed"),
        ({"removed": {"documents": 2, "entries": 299}}, "entries are 298, fewer than .* among the removed"),
    ],
)
def test_growth_that_cannot_be_is_refused(grown: Path, changes: dict[str, Any], message: str) -> None:
    changed(grown, changes)
    with pytest.raises(DatastoreCorrupt, match=f"is not a manifest: .*{message}"):
        Manifest.load(grown)


@pytest.mark.parametrize("name", ["keys.2.npy", "values.2.npy", "tokens.7.npy", "documents.7.jsonl", "removed.npy"])
def test_files_of_what_was_added_or_removed_must_be_listed(grown: Path, name: str) -> None:
    files = json.loads((grown / "manifest.json").read_text())["files"]
    del files[name]
    changed(grown, {"files": files})
    with pytest.raises(DatastoreCorrupt, match=f"{name} is not among files"):
        Manifest.load(grown)


def test_a_manifest_too_large_to_be_read_is_not_written(tmp_path: Path) -> None:
    path = toy_datastore(tmp_path)
    manifest = Manifest.load(path)
    record = manifest.files["keys.npy"]
    files = {**manifest.files, **{f"values.{number}.npy": record for number in range(80_000)}}
    with pytest.raises(Conflict, match=r"would have \d+ bytes, at most 8388608 are read: `knnlm compact toy`"):
        manifest.model_copy(update={"files": files}).save(path)
    assert Manifest.load(path) == manifest


def test_a_tuning_with_a_rule_and_fitted_search_options_comes_back(path: Path, tmp_path: Path) -> None:
    fitted = SearchOptions(nprobe=3, overfetch=2.5, rescore=True)
    tuning = Tuning(
        10.0, 0.25, 64, 20.0, 15.0, 1000, 10, rule="other", parameters={"slope": 0.5, "edges": (1.0, 2.0)},
        search=fitted, index="ivf4", quality=(SearchQuality("default", SearchOptions(), 15.5, 900.0),
                                              SearchQuality("chosen", fitted, 15.0, None, chosen=True)),
        cache={"lambda": 0.1, "theta": 0.5, "size": 500.0},
        rules=(RuleQuality("fixed", 15.0), RuleQuality("other", 14.0, -0.1, -0.2, -0.05, chosen=True)),
    )  # fmt: skip
    manifest = Manifest.load(path).model_copy(update={"tuning": TuningRecord.of(tuning)})
    manifest.save(tmp_path)
    read = Manifest.load(tmp_path).tuning
    assert read is not None
    assert read.message() == tuning


def test_a_tuning_without_them_is_written_as_before_there_were_any(path: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(path).model_copy(
        update={"tuning": TuningRecord.of(Tuning(10.0, 0.25, 64, 20.0, 15.0, 1000, 10))}
    )
    manifest.save(tmp_path)
    assert list(json.loads((tmp_path / "manifest.json").read_text())["tuning"]) == [
        "temperature", "lmbda", "k", "lm_perplexity", "knn_perplexity", "tokens", "documents",
    ]  # fmt: skip


@pytest.mark.parametrize("search", [{"beam": 3}, {"nprobe": 0}])
def test_search_options_that_none_can_have_are_no_manifest(search: dict[str, object]) -> None:
    fields = TuningRecord.of(Tuning(10.0, 0.25, 64, 20.0, 15.0, 1000, 10)).model_dump()
    with pytest.raises(ValidationError):
        TuningRecord.model_validate({**fields, "search": search})
