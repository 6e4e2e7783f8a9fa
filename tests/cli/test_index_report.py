"""`knnlm index report`: a table, a page and one JSON document, and nothing left behind."""

from pathlib import Path

import pytest

from knnlm.datastore.manifest import Manifest
from knnlm.evaluation import index_report
from tests.cli.conftest import Knnlm

RECIPES = ("--recipes", "flat ivf4,sq8@nprobe=2", "--queries", 64)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds and rounds of timing are no options."""
    monkeypatch.setattr(index_report.index_report, "__kwdefaults__", {
        **(index_report.index_report.__kwdefaults__ or {}), "seconds": 0.001, "rounds": 1,
    })  # fmt: skip


def test_report_prints_what_every_index_is_worth(knnlm: Knnlm, store: Path, corpus: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    before = Manifest.load(store / "toy" / "v1")
    answer = knnlm("index", "report", "toy", corpus, "--part", "report", *RECIPES, "--page", page)
    assert answer.code == 0, answer.err
    assert "ivf4,sq8@nprobe=2, not rescored" in answer.out
    assert "total variation" in answer.out
    assert "with exact search at temperature" in answer.out
    assert "ivf4,sq8@nprobe=2</text>" in page.read_text(encoding="utf-8")
    assert Manifest.load(store / "toy" / "v1") == before
    assert sorted(f.name for f in (store / "toy").iterdir()) == ["CURRENT", "v1"]


def test_report_as_json(knnlm: Knnlm, store: Path, corpus: Path) -> None:
    said = knnlm("index", "report", "toy", corpus, "--part", "report", *RECIPES, "--json").json
    assert [(i["name"], i["rescored"]) for i in said["indexes"]] == [
        ("flat", True), ("ivf4,sq8@nprobe=2", True), ("ivf4,sq8@nprobe=2", False),
    ]  # fmt: skip
    assert said["domain"] == "toy"
    assert said["queries"] == 64


def test_report_leaves_out_what_the_datastore_holds(knnlm: Knnlm, store: Path, corpus: Path) -> None:
    answer = knnlm("index", "report", "toy", corpus, "--part", "store", *RECIPES)
    assert answer.code == 2
    assert "no document to ask for that is not in" in answer.err


def test_a_stopped_report_says_where_its_work_is_and_goes_on(
    knnlm: Knnlm, store: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("index", "report", "toy", corpus, "--part", "report", *RECIPES)
    with monkeypatch.context() as patch:

        def stopped(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(index_report, "interleave", stopped)
        answer = knnlm(*command)
    assert answer.code == 130
    folder = store / "toy" / ".v1.report"
    assert f"what was finished is in {folder}: the same command goes on" in answer.err
    assert len(list(folder.glob("line-*.json"))) == 3
    assert knnlm(*command).code == 0
    assert not folder.exists()


def test_work_that_was_asked_for_stays(knnlm: Knnlm, store: Path, corpus: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert knnlm("index", "report", "toy", corpus, "--part", "report", *RECIPES, "--work", work).code == 0
    assert len(list(work.glob("index-*.faiss"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipes", " "), "expected at least one recipe"),
        (("--queries", "0"), "queries must be >= 1, got 0"),
        (("--recipe", "flat"), "No such option: --recipe"),
    ],
)
def test_what_cannot_be_is_refused(
    knnlm: Knnlm, store: Path, corpus: Path, arguments: tuple[str, ...], message: str
) -> None:
    answer = knnlm("index", "report", "toy", corpus, *arguments)
    assert answer.code == 2
    assert message in answer.err
