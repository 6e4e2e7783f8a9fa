"""What the commands that read say of a version that has grown."""

from pathlib import Path

import pytest

from knnlm.testing import ToyLanguageModel
from tests.cli.conftest import Knnlm
from tests.grown import base, grow, some_documents

LM = ToyLanguageModel(key_dim=16)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """v1 of 600 entries in 3 documents; v2 with 200 in 2, in two segments, and without 150 + 90 of one and one."""
    parent = base(tmp_path / "store", some_documents("base", [200, 150, 250], seed=0), LM)
    grow(parent, LM, [some_documents("first", [110], 1), some_documents("second", [90], 2)], [1, 4])
    return tmp_path / "store"


def test_show_tells_what_was_added_and_removed(knnlm: Knnlm, store: Path) -> None:
    found = knnlm("show", "toy", "--store", store, "--version", "v2")
    assert found.code == 0
    lines = {" ".join(line.split()) for line in found.out.splitlines()}
    memory = 4 * 200 * 16 + 2 * 200 * 16  # as float32 to be searched, and as stored since there are two segments
    assert "entries 560 of 3 documents" in lines
    assert f"added 200 of 2 documents, 2 times; {memory:,} bytes in memory" in lines
    assert "removed 240 of 2 documents" in lines
    assert "grown from v1" in lines
    before = knnlm("show", "toy", "--store", store, "--version", "v1").out
    assert not any(word in before for word in ("added", "removed", "grown"))


def test_show_shows_entries_that_were_added(knnlm: Knnlm, store: Path) -> None:
    found = knnlm("show", "toy", "--store", store, "--version", "v2", "--entry", 600, "--entry", 799, "--json").json
    assert [(e["document"], e["position"]) for e in found["shown"]] == [("first0", 1), ("second0", 90)]
    assert found["added_memory"] == 4 * 200 * 16 + 2 * 200 * 16
    assert [segment["entries"] for segment in found["segments"]] == [110, 90]
    beyond = knnlm("show", "toy", "--store", store, "--version", "v2", "--entry", 800)
    assert beyond.code != 0
    assert "expected [0, 800)" in beyond.err


def test_index_is_of_the_base(knnlm: Knnlm, store: Path) -> None:
    made = knnlm("index", "build", "toy", "--store", store, "--version", "v2", "--recipe", "ivf4,sq8", "--json").json
    assert made["index"] == "ivf4,sq8"
    assert knnlm("verify", "toy", "--store", store, "--version", "v2").code == 0
    assert knnlm("verify", "--all", "--store", store).code == 0


def test_verify_names_the_file_of_a_segment(knnlm: Knnlm, store: Path) -> None:
    file = store / "toy" / "v2" / "values.2.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    found = knnlm("verify", "toy", "--store", store, "--version", "v2")
    assert found.code == 1
    assert "values.2.npy  has sha256" in found.out
