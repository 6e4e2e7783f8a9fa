"""Damaged files, one bit at a time: found when checked for, and never the end of the process or a wrong number."""

from pathlib import Path

import numpy as np
import pytest

from knnlm.datastore.reader import Datastore
from knnlm.errors import DatastoreCorrupt, InvalidRequest
from knnlm.index.build import build_index
from knnlm.index.searcher import Searcher
from knnlm.messages import Document, SearchRequest
from knnlm.options import SearchOptions
from knnlm.testing import ToyLanguageModel
from tests.grown import base, grow

LM = ToyLanguageModel(key_dim=8)
TEXTS = ["the cat sat on the mat", "", "a dog", "the cat sat on the log and looked at the dog"]
FILES = ["manifest.json", "keys.npy", "values.npy", "tokens.npy", "documents.jsonl", "tokenizer.json", "removed.npy",
         "keys.1.npy", "values.1.npy", "tokens.1.npy", "documents.1.jsonl"]  # fmt: skip
HEADER = 128  # bytes of a .npy file: where a flip is most likely to be misread


@pytest.fixture
def path(tmp_path: Path) -> Path:
    parent = base(tmp_path / "store", [Document(str(i), text) for i, text in enumerate(TEXTS)], LM)
    return grow(parent, LM, [[Document("a", "on the mat"), Document("b", "a log")], [Document("c", "cat")]], [2, 5])


def flip(file: Path, at: int, bit: int) -> bytes:
    """Returns what the file was. It becomes a file of its own, if it was shared."""
    original = file.read_bytes()
    damaged = bytearray(original)
    damaged[at] ^= 1 << bit
    restore(file, bytes(damaged))
    return original


def restore(file: Path, data: bytes) -> None:
    file.unlink()
    file.write_bytes(data)


def outcome(path: Path, queries: np.typing.NDArray[np.floating]) -> str:
    """Open and search. What is answered is checked; raises what is no DatastoreCorrupt."""
    try:
        searcher = Searcher.open(path)
        searcher.warm()
    except DatastoreCorrupt:
        return "refused"
    try:
        for k, rescore in ((3, None), (1000, None), (1000, False)):
            result = searcher.search(
                SearchRequest(
                    "toy", queries, SearchOptions(k=k, rescore=rescore), ids=True, passages=50, passage_tokens=9
                )
            )
            found = result.neighbors
            assert np.isfinite(found.distances).all()
            assert (found.distances >= 0).all()
            assert found.ids is not None
            assert found.ids.max() < Datastore.open(path).entries
            assert ((found.values >= 0) == (found.ids >= 0)).all()
            assert found.values.max() < len(LM.tokenizer)
            for passage in (passage for row in result.passages for passage in row):
                shown = np.concatenate([passage.before, passage.after])
                assert shown.min() >= 0
                assert shown.max() < len(LM.tokenizer)
                assert len(passage.after)
    except DatastoreCorrupt:
        return "found"
    finally:
        searcher.close()
    return "answered"


def places(size: int, header: bool, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    ends = [HEADER, size] if header else [size]
    return [(int(rng.integers(end)), int(rng.integers(8))) for end in ends for _ in range(count // len(ends))]


def check_flips(path: Path, name: str, count: int) -> dict[str, int]:
    queries = np.array(Datastore.open(path).keys[:4])
    rng = np.random.default_rng(FILES.index(name))
    seen = {"refused": 0, "found": 0, "answered": 0}
    for at, bit in places((path / name).stat().st_size, name.endswith(".npy"), count, rng):
        original = flip(path / name, at, bit)
        try:
            seen[outcome(path, queries)] += 1
        except Exception as err:
            raise AssertionError(f"bit {bit} of byte {at} of {name}: {type(err).__name__}: {err}") from err
        restore(path / name, original)
    assert outcome(path, queries) == "answered"
    return seen


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_refused_or_harmless(path: Path, name: str) -> None:
    seen = check_flips(path, name, 24)
    if name == "manifest.json":
        assert seen["answered"] == seen["found"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_many_flipped_bits_are_refused_or_harmless(path: Path, name: str) -> None:
    check_flips(path, name, 300)


@pytest.mark.parametrize("check", ["small", "all"])
def test_a_flipped_bit_is_found_before_anything_is_read(path: Path, check: str) -> None:
    build_index(path, "sq8")
    Searcher.open(path, check=check).close()  # type: ignore[arg-type]  # one of those it takes
    for name in [*FILES[1:], next(path.glob("index.*.faiss")).name]:
        original = flip(path / name, (path / name).stat().st_size - 3, 3)
        if check == "small" and name.startswith("keys"):
            Searcher.open(path, check="small").close()
        else:
            with pytest.raises(DatastoreCorrupt, match=rf"/{name} has sha256 [0-9a-f]{{64}}, expected [0-9a-f]{{64}}"):
                Searcher.open(path, check=check)  # type: ignore[arg-type]
        restore(path / name, original)


def test_by_default_nothing_is_compared(path: Path) -> None:
    flip(path / "tokenizer.json", 150, 3)
    Searcher.open(path).close()


def test_a_file_that_is_gone_is_named_when_checked_for(path: Path) -> None:
    (path / "tokens.1.npy").unlink()
    with pytest.raises(DatastoreCorrupt, match=r"tokens\.1\.npy is missing"):
        Searcher.open(path, check="all")


def test_another_word_for_checking_is_refused(path: Path) -> None:
    with pytest.raises(InvalidRequest, match="check must be one of none, small, all, got 'some'"):
        Searcher.open(path, check="some")  # type: ignore[arg-type]


def test_a_key_that_is_no_number_stops_no_version_from_being_served(path: Path) -> None:
    keys = np.load(path / "keys.npy")
    asked = keys[2:4].copy()
    keys[:2] = [[np.nan], [np.inf]]
    (path / "keys.npy").unlink()
    np.save(path / "keys.npy", keys)
    searcher = Searcher.open(path)
    searcher.warm()
    found = searcher.search(SearchRequest("toy", asked, SearchOptions(k=1000), ids=True)).neighbors
    assert np.isfinite(found.distances).all()
    np.testing.assert_array_equal(found.distances[:, 0], 0)
