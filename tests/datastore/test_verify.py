import json
from pathlib import Path

import numpy as np
import pytest

from knnlm.datastore.files import sha256_of
from knnlm.datastore.layout import FileRecord
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.verify import verify
from knnlm.messages import Document
from knnlm.testing import TEXTS, ToyLanguageModel, toy_datastore
from tests.grown import base, grow

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


GROWN = ("keys.1.npy", "values.1.npy", "tokens.1.npy", "documents.1.jsonl", "removed.npy")


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    """Entries 0 to 289 of the base, 290 to 297 and 298 to 305 that were added."""
    lm = ToyLanguageModel()
    parent = base(tmp_path / "grown", [Document(str(i), text) for i, text in enumerate(TEXTS)], lm)
    return grow(parent, lm, [[Document("a", "a cat"), Document("b", "sat")], [Document("c", "on a mat")]], [1, 4])


def test_sound_version_that_has_grown_has_no_problem(grown: Path) -> None:
    checks = list(verify(grown))
    assert [c for c in checks if c.problem is not None] == []
    names = {c.name for c in checks}
    assert names >= {*FILES, *GROWN}
    for relation in ("covers the tokens", "are the tokens they stand for", "are finite"):
        assert sum(relation in name for name in names) == 3
    assert "removed.npy: names documents" in names


@pytest.mark.slow
def test_every_flipped_byte_of_a_version_that_has_grown_is_found(grown: Path) -> None:
    for name in (*FILES, *GROWN):
        original = (grown / name).read_bytes()
        (grown / name).unlink()  # the base's are shared
        for at in range(len(original)):
            damaged = bytearray(original)
            damaged[at] ^= 1 << at % 8
            (grown / name).write_bytes(bytes(damaged))
            assert name in problems(grown), f"byte {at} of {name}"
        (grown / name).write_bytes(original)


@pytest.mark.parametrize("name", GROWN)
def test_any_flipped_byte_of_what_was_added_is_found(grown: Path, name: str) -> None:
    original = (grown / name).read_bytes()
    rng = np.random.default_rng(0)
    for at in {0, len(original) - 1, *rng.integers(0, len(original), 20).tolist()}:
        damaged = bytearray(original)
        damaged[at] ^= 1 << int(rng.integers(8))
        (grown / name).write_bytes(bytes(damaged))
        assert name in problems(grown), f"byte {at} of {name}"


def test_a_segment_that_nobody_lists_is_found(grown: Path) -> None:
    (grown / "keys.3.npy").write_bytes(b"")
    assert problems(grown) == {"keys.3.npy": "is not listed in the manifest"}


def test_what_a_segment_says_is_compared_as_in_the_base(grown: Path) -> None:
    values, keys = np.load(grown / "values.2.npy"), np.load(grown / "keys.1.npy")
    values[3] += 1
    keys[5, 3] = np.inf
    np.save(grown / "values.2.npy", values)
    np.save(grown / "keys.1.npy", keys)
    resealed(grown, "values.2.npy")
    resealed(grown, "keys.1.npy")
    found = problems(grown)
    assert found.keys() == {"values.2.npy: are the tokens they stand for", "keys.1.npy: are finite"}
    assert "entry 301 has value" in found["values.2.npy: are the tokens they stand for"]
    assert found["keys.1.npy: are finite"] == "the key of entry 295 is not finite"


def test_documents_of_a_segment_that_do_not_cover_it_are_found(grown: Path) -> None:
    file = grown / "documents.2.jsonl"
    file.write_text(file.read_text().replace('"tokens": 9', '"tokens": 8'))
    resealed(grown, file.name)
    assert "expected 1 documents, 9 tokens and 8 entries" in problems(grown)["opening"]


def test_removed_documents_that_are_none_are_found(grown: Path) -> None:
    np.save(grown / "removed.npy", np.array([1, 7], "<i8"))
    resealed(grown, "removed.npy")
    assert "names document 7, expected [0, 7)" in problems(grown)["opening"]
