"""A lab with little text, the pages of docs/, that all tests here share."""

from pathlib import Path

import pytest

from benchmarks.harness import ROOT
from experiments.lab import Lab
from experiments.scale import SCALES
from experiments.texts import Texts, of_documents
from knnlm.messages import Document


def sections(files: list[Path]) -> list[Document]:
    """Every section of these pages as a document."""
    parts = [(f.name, number, part) for f in files for number, part in enumerate(f.read_text("utf-8").split("\n## "))]
    return [Document(f"{name}/{number}", part) for name, number, part in parts if len(part) > 200]


@pytest.fixture(scope="session")
def texts() -> Texts:
    files = sorted(f for f in (ROOT / "docs").glob("*.md") if f.stem not in ("paper", "log"))
    half = len(files) // 2
    return Texts(
        "docs",
        tuple(of_documents(n, sections(f)) for n, f in (("first", files[:half]), ("second", files[half:]))),
        None,
    )


@pytest.fixture(scope="session")
def lab(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(SCALES["toy"], texts, tmp_path_factory.mktemp("lab"))
