"""Indexes beside each other: what is compared, that the datastore stays as it is, and that finished work is kept."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from knnlm.datastore.files import locked
from knnlm.errors import Conflict, InvalidRequest
from knnlm.evaluation.collect import HeldOut
from knnlm.evaluation.index_candidates import Candidate, candidates, default_candidates
from knnlm.evaluation.index_page import index_page, plotted_cell
from knnlm.evaluation.index_report import IndexReport, index_report
from knnlm.index.flat import Flat
from knnlm.index.ivf import Ivf
from knnlm.index.searcher import Searcher
from knnlm.index.table import family
from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions
from tests.index.helpers import Floats, brute_force, clustered, datastore

ENTRIES, DIM, QUERIES = 1200, 16, 48
NAMES = ["flat", "ivf8,sq4", "ivf8,flat@nprobe=1"]
QUICK: dict[str, Any] = {"batches": (1, 16), "ks": (8, 32), "seconds": 0.001, "rounds": 1}


@pytest.fixture(scope="module")
def keys() -> Floats:
    return clustered(ENTRIES, DIM)


@pytest.fixture
def path(tmp_path: Path, keys: Floats) -> Path:
    return datastore(tmp_path / "store", keys)


@pytest.fixture
def held_out(keys: Floats, path: Path) -> HeldOut:
    """Queries near keys, whose tokens are the values of these keys: retrieval helps."""
    rng = np.random.default_rng(1)
    chosen = rng.integers(0, ENTRIES, QUERIES)
    queries = (keys[chosen] + 0.1 * rng.standard_normal((QUERIES, DIM))).astype(np.float32)
    values = np.load(path / "values.npy")
    return HeldOut(queries, np.full(QUERIES, -5.0, np.float32), values[chosen].astype(np.int32), 2)


def chosen(names: list[str] = NAMES) -> list[Candidate]:
    return candidates(names, ENTRIES, DIM)


@pytest.fixture
def report(path: Path, held_out: HeldOut, tmp_path: Path) -> IndexReport:
    return index_report(path, held_out, chosen(), tmp_path / "work", **QUICK)


def test_every_candidate_is_judged_with_rescoring_and_without(report: IndexReport) -> None:
    assert [line.name for line in report.lines] == [
        "flat",
        "ivf8,sq4",
        "ivf8,sq4, not rescored",
        "ivf8,flat@nprobe=1",
        "ivf8,flat@nprobe=1, not rescored",
    ]


def test_every_speed_is_there_and_positive(report: IndexReport) -> None:
    for line in report.lines:
        assert set(line.speeds) == {(b, k) for b in (1, 16) for k in (8, 32)}
        assert all(speed > 0 for speed in line.speeds.values())


def test_exact_search_is_exact_and_one_list_of_eight_is_not(report: IndexReport) -> None:
    flat, one_list = report.lines[0], report.lines[3]
    assert flat.quality == report.exact
    assert (flat.quality.recalls, flat.quality.total_variation) == ({8: 1.0, 32: 1.0}, 0.0)
    assert one_list.quality.recalls[32] < 1
    assert one_list.quality.total_variation > 0
    assert report.exact.perplexity < report.lm_perplexity


def test_rescoring_finds_more_than_four_bits_say(report: IndexReport) -> None:
    rescored, plain = report.lines[1:3]
    assert rescored.quality.recalls[32] > plain.quality.recalls[32]
    assert rescored.quality.total_variation < plain.quality.total_variation


def test_recall_is_that_of_a_search_with_these_options(
    report: IndexReport, path: Path, keys: Floats, held_out: HeldOut, tmp_path: Path
) -> None:
    file = tmp_path / "own.faiss"
    ivf = family("ivf8,flat")
    parameters = ivf.build(keys, file, 0, lambda *_: None)
    searcher = Searcher.open(path)
    searcher = Searcher(searcher._datastore, ivf.open(keys, file, parameters, resident=False), recipe="ivf8,flat")
    request = SearchRequest("toy", held_out.queries, SearchOptions(k=32, nprobe=1), ids=True)
    found = searcher.search(request).neighbors.ids
    assert found is not None
    _, expected = brute_force(keys, held_out.queries, 32)
    hits = sum(len(set(mine) & set(theirs)) for mine, theirs in zip(found, expected, strict=True))
    assert report.lines[3].quality.recalls[32] == pytest.approx(hits / expected.size)


def test_bytes_per_key_count_the_index_and_the_keys_that_rescoring_reads(report: IndexReport) -> None:
    flat, sq4, plain = report.lines[:3]
    assert flat.bytes_per_key == 4 * DIM
    assert DIM / 2 + 8 <= sq4.bytes_per_key < DIM / 2 + 16  # codes, ids and a few centroids
    assert (sq4.stored_bytes_per_key, plain.stored_bytes_per_key) == (4 * DIM, 0)


def test_the_datastore_stays_as_it_is(path: Path, held_out: HeldOut, tmp_path: Path) -> None:
    before = {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in path.iterdir()}
    index_report(path, held_out, chosen(), tmp_path / "work", **QUICK)
    assert {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in path.iterdir()} == before


def test_what_was_finished_is_taken_up(
    path: Path, held_out: HeldOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    built: list[str] = []
    original = Ivf.build

    def build(self: Ivf, *arguments: object) -> object:
        if self.recipe == "ivf8,flat" and not built.count(self.recipe):
            built.append(self.recipe)
            raise KeyboardInterrupt
        built.append(self.recipe)
        return original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Ivf, "build", build)
    with pytest.raises(KeyboardInterrupt):
        index_report(path, held_out, chosen(), work, **QUICK)
    assert built == ["ivf8,sq4", "ivf8,flat"]
    assert not list(work.glob("*.tmp"))
    found = index_report(path, held_out, chosen(), work, **QUICK)
    assert built == ["ivf8,sq4", "ivf8,flat", "ivf8,flat"]
    fresh = index_report(path, held_out, chosen(), tmp_path / "other", **QUICK)
    assert [line.quality for line in found.lines] == [line.quality for line in fresh.lines]


def test_a_finished_report_searches_again_only_for_speed(
    path: Path, held_out: HeldOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = index_report(path, held_out, chosen(), tmp_path / "work", **QUICK)
    monkeypatch.setattr("knnlm.evaluation.index_report.judge", lambda *_: pytest.fail("judged again"))
    second = index_report(path, held_out, chosen(), tmp_path / "work", **QUICK)
    assert [line.quality for line in second.lines] == [line.quality for line in first.lines]


def test_other_queries_are_judged_anew(path: Path, held_out: HeldOut, tmp_path: Path) -> None:
    first = index_report(path, held_out, chosen(["flat"]), tmp_path / "work", **QUICK)
    other = replace(held_out, lm_log_probs=held_out.lm_log_probs - 1)
    second = index_report(path, other, chosen(["flat"]), tmp_path / "work", **QUICK)
    assert second.lm_perplexity == pytest.approx(first.lm_perplexity * np.e)
    assert second.lines[0].quality != first.lines[0].quality


def test_two_reports_in_one_folder_are_a_conflict(path: Path, held_out: HeldOut, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with locked(work, wait=False, doing="testing"), pytest.raises(Conflict, match="reporting"):
        index_report(path, held_out, chosen(["flat"]), work, **QUICK)


def test_progress_counts_up_to_its_end(path: Path, held_out: HeldOut, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    index_report(path, held_out, chosen(), tmp_path / "work", on_progress=lambda *said: heard.append(said), **QUICK)
    assert [done for _, done, _ in heard] == list(range(1 + 2 * 3 + 4))
    assert {total for _, _, total in heard} == {1 + 2 * 3 + 4}


def test_batches_larger_than_the_queries_are_left_out(path: Path, held_out: HeldOut, tmp_path: Path) -> None:
    found = index_report(
        path, held_out, chosen(["flat"]), tmp_path / "work", batches=(1, 64), ks=(8,), seconds=0.001, rounds=1
    )
    assert found.batches == (1,)


@pytest.mark.parametrize("wrong", [{"ks": ()}, {"ks": (0,)}, {"seconds": 0.0}, {"rounds": 0}])
def test_numbers_out_of_range_are_refused(path: Path, held_out: HeldOut, tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="expected recipes"):
        index_report(path, held_out, chosen(["flat"]), tmp_path / "work", **{**QUICK, **wrong})


def test_the_report_is_json(report: IndexReport) -> None:
    said = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert said["indexes"][3]["nprobe"] == 1
    assert len(said["indexes"][0]["queries_per_second"]) == 4
    assert said["exact"]["recalls"] == {"8": 1.0, "32": 1.0}


def test_candidates_have_options() -> None:
    assert Candidate.parse("ivf4,sq8@nprobe=3,overfetch=1.5") == Candidate(
        "ivf4,sq8@nprobe=3,overfetch=1.5", "ivf4,sq8", SearchOptions(nprobe=3, overfetch=1.5)
    )
    assert Candidate.parse("hnsw8@ef_search=9").search == SearchOptions(ef_search=9)
    assert Candidate.parse("flat") == Candidate("flat", "flat")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flat@", "unknown option ''"),
        ("flat@nprobe", "nprobe must be a whole number >= 1, got ''"),
        ("flat@nprobe=x", "nprobe must be a whole number >= 1, got 'x'"),
        ("flat@probes=3", "there are nprobe, ef_search, overfetch"),
        ("ivf4@nprobe=0", "nprobe must be >= 1, got 0"),
        ("ivf4@nprobe=1.5", "nprobe must be a whole number >= 1"),
        ("ivf4@overfetch=0.5", "overfetch must be >= 1"),
        ("ivf4@overfetch=nan", "overfetch must be >= 1"),
        ("ivf9999,flat", "does not suit"),
        ("nothing", "unknown index recipe"),
    ],
)
def test_candidates_that_cannot_be_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        candidates([text], ENTRIES, DIM)


def test_a_candidate_counts_once() -> None:
    assert len(candidates(["flat", "ivf4,sq8", "flat"], ENTRIES, DIM)) == 2


@pytest.mark.parametrize(("entries", "dim"), [(1, 8), (50, 7), (5000, 32), (10**5, 256), (10**6, 256), (10**8, 768)])
def test_default_candidates_suit_whatever_the_size(entries: int, dim: int) -> None:
    found = default_candidates(entries, dim)
    assert found[0].recipe == "flat"
    assert len({c.name for c in found}) == len(found)
    for candidate in found:
        assert family(candidate.recipe).why_unsuitable(entries, dim) is None


def test_default_candidates_of_many_keys_have_every_family_and_the_recipe_of_the_paper() -> None:
    names = [c.name for c in default_candidates(10**6, 256)]
    assert "ivf4096,pq64@nprobe=32" in names
    words = {re.split(r"[\d,]", name)[0] for name in names}
    assert {"flat", "ivf", "pq", "hnsw", "pca", "opq"} <= words
    codes = {name.rpartition(",")[2] for name in names}
    assert {"fp16", "sq8", "rabitq", "pq64x4fs", "pq128x4fs"} <= codes


def chart(page: str) -> ElementTree.Element:
    return ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])  # noqa: S314  our own text


def test_the_page_draws_and_names_every_line(report: IndexReport) -> None:
    drawn = chart(index_page(report))
    assert len(list(drawn.iter("circle"))) == len(report.lines)
    labels = [text.text for text in drawn.iter("text")]
    for line in report.lines:
        assert line.candidate.name in labels
    filled = sum(circle.attrib["fill"] != "none" for circle in drawn.iter("circle"))
    assert filled == sum(line.rescored for line in report.lines)


def test_faster_is_to_the_right_and_better_is_lower(report: IndexReport) -> None:
    slow, fast = report.lines[0], report.lines[1]
    cell = plotted_cell(report)
    slow = replace(slow, speeds={**slow.speeds, cell: 10.0}, quality=replace(slow.quality, perplexity=50.0))
    fast = replace(fast, speeds={**fast.speeds, cell: 1000.0}, quality=replace(fast.quality, perplexity=40.0))
    circles = list(chart(index_page(replace(report, lines=(slow, fast)))).iter("circle"))
    by_x = sorted(circles, key=lambda circle: float(circle.attrib["cx"]))
    assert float(by_x[0].attrib["cy"]) < float(by_x[1].attrib["cy"])  # y grows downwards in SVG


def test_the_page_fetches_nothing_and_escapes_names(report: IndexReport) -> None:
    page = index_page(replace(report, domain="<script>x</script>"))
    assert "<script" not in page
    assert not re.search(r"(src|href)=|https?://|@import", page)


def test_one_point_can_be_drawn(report: IndexReport) -> None:
    assert "nan" not in index_page(replace(report, lines=report.lines[:1]))


def test_the_cell_that_is_drawn_is_the_nearest_there_is(report: IndexReport) -> None:
    assert plotted_cell(report) == (16, 32)
    assert plotted_cell(replace(report, batches=(1, 16, 64, 512), ks=(64, 1024))) == (64, 1024)


def test_flat_is_not_built_as_a_file(path: Path, held_out: HeldOut, tmp_path: Path) -> None:
    index_report(path, held_out, chosen(["flat"]), tmp_path / "work", **QUICK)
    assert not Flat.has_file
    assert not list((tmp_path / "work").glob("*.faiss"))
