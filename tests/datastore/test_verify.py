import json
from pathlib import Path

import numpy as np
import pytest

from knnlm.datastore.files import sha256_of
from knnlm.datastore.manifest import FileRecord, Manifest
from knnlm.datastore.verify import verify
from knnlm.testing import toy_datastore

FILES = ("manifest.json", "keys.npy", "values.npy", "tokens.npy", "documents.jsonl", "tokenizer.json")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return toy_datastore(tmp_path)


def problems(path: Path) -> dict[str, str]:
    return {check.name: check.problem for check in verify(path) if check.problem is not None}


def resealed(path: Path, name: str) -> None:
    """Write the manifest that a program would have written which made file `name` wrong."""
    record = FileRecord(bytes=(path / name).stat().st_size, sha256=sha256_of(path / name))
    manifest = Manifest.load(path)
    manifest.model_copy(update={"files": {**manifest.files, name: record}}).save(path)


def test_sound_version_has_no_problem(path: Path) -> None:
    checks = list(verify(path))
    assert [c.name for c in checks if c.problem is not None] == []
    assert {c.name for c in checks} >= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_byte_is_found(path: Path, name: str) -> None:
    original = (path / name).read_bytes()
    rng = np.random.default_rng(0)
    for at in {0, len(original) - 1, *rng.integers(0, len(original), 60).tolist()}:
        damaged = bytearray(original)
        damaged[at] ^= 1 << int(rng.integers(8))
        (path / name).write_bytes(bytes(damaged))
        assert name in problems(path), f"byte {at} of {name}"
    (path / name).write_bytes(original)
    assert problems(path) == {}


def test_white_space_in_the_manifest_is_found(path: Path) -> None:
    file = path / "manifest.json"
    original = file.read_bytes()
    for old, new in ((b"\n", b"\t"), (b"  ", b" \t"), (b": ", b":\n")):
        file.write_bytes(original.replace(old, new, 1))
        assert "manifest.json" in problems(path)


@pytest.mark.parametrize("name", FILES)
def test_missing_and_shortened_files_are_found(path: Path, name: str) -> None:
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[:-1])
    assert name in problems(path)
    (path / name).unlink()
    assert name in problems(path)


def test_unlisted_file_is_found(path: Path) -> None:
    (path / "notes.txt").write_text("x")
    assert problems(path) == {"notes.txt": "is not listed in the manifest"}


def test_values_that_are_not_their_tokens_are_found(path: Path) -> None:
    values = np.load(path / "values.npy")
    values[7] += 1
    np.save(path / "values.npy", values)
    resealed(path, "values.npy")
    assert "entry 7 has value" in problems(path)["values.npy: are the tokens they stand for"]


def test_documents_that_do_not_cover_the_tokens_are_found(path: Path) -> None:
    file = path / "documents.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[-1]["tokens"] -= 1
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    resealed(path, "documents.jsonl")
    assert "(4, 293, 289), expected (4, 294, 290)" in problems(path)["documents.jsonl: covers the tokens"]


def test_keys_that_are_not_finite_are_found(path: Path) -> None:
    keys = np.load(path / "keys.npy")
    keys[5, 3] = np.nan
    np.save(path / "keys.npy", keys)
    resealed(path, "keys.npy")
    assert problems(path) == {"keys.npy: are finite": "the key of entry 5 is not finite"}


def test_another_tokenizer_is_found(path: Path) -> None:
    (path / "tokenizer.json").write_text("{}")
    resealed(path, "tokenizer.json")
    assert "the model's has" in problems(path)["tokenizer.json: is the model's"]


def test_folder_that_is_no_version_is_one_problem(tmp_path: Path) -> None:
    assert list(problems(tmp_path / "nowhere")) == ["manifest.json"]
