"""What the workers of a cluster do, in this process and without Ray: pieces done in any order, and again."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnlm.cluster import parts, sources
from knnlm.cluster.objects import below, discard_objects, make_folder
from knnlm.cluster.parts import Job, UnitTokens, encode_part, make_shard, part_of, placed_rows, plan, tokenize_unit
from knnlm.cluster.plan import Plan
from knnlm.cluster.sources import SourceFile, read_files, source_files, units
from knnlm.cluster.worker import ModelSource
from knnlm.datastore.build import build, identity_of
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.encode import plan_parts
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore
from knnlm.datastore.shards import plan_shards
from knnlm.datastore.text import read_documents
from knnlm.datastore.verify import verify
from knnlm.errors import Conflict, DatastoreCorrupt, InvalidRequest
from knnlm.evaluation.splits import Part
from knnlm.index.sharded_build import add_shard, train_shards
from knnlm.index.table import family
from knnlm.testing import TEXTS, ToyLanguageModel, toy_datastore
from tests.sharding import sharded


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "no.txt").write_text("never read")
    (folder / "picture.png").write_text("no text")
    (folder / "blank.txt").write_text(" ")
    (folder / "a.txt").write_text(TEXTS[0])
    (folder / "deep" / "b.md").write_text(TEXTS[1])
    (folder / "c.jsonl").write_text('{"text": "one"}\r\n\n{"id": "two", "text": "naïve café"}\n', encoding="utf-8")
    (folder / "d.txt").write_text(TEXTS[3] * 3, encoding="utf-8")
    return folder


def job(folder: Path, text: Path, bos: str = "document") -> Job:
    """All units of the text, each of one or two files."""
    lm = ToyLanguageModel()
    identity = identity_of(lm.info, 16, 8, bos, "float32")
    made = [
        tokenize_unit(folder, i, unit, Part.ALL, lm.tokenizer, lm.info.vocab_size, False)
        for i, unit in enumerate(units(source_files([str(text)]), 150))
    ]
    assert len(made) > 2
    return Job(folder, identity, tuple(sources.tokens for sources in made), 64)


@pytest.mark.parametrize("as_url", [False, True])
def test_sources_are_those_of_one_process(text: Path, as_url: bool) -> None:
    if as_url:
        pytest.importorskip("pyarrow")
    for source in (text, text / "c.jsonl"):
        files = source_files([source.as_uri() if as_url else str(source)])
        assert list(read_files(files)) == list(read_documents([source]))


@pytest.mark.parametrize("name", ["50%.txt", "a b.txt", "w?x=1.txt", "a#b.txt", "a%20b.txt", "ünï/ä.txt", "+&;.md"])
def test_files_of_any_name_are_read_at_a_url(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow")
    for file, text in ((name, "this one"), ("a", "another"), ("w", "another"), ("a b", "another")):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text, encoding="utf-8")
    assert list(read_files(source_files([tmp_path.as_uri()]))) == list(read_documents([tmp_path]))


@pytest.mark.parametrize(
    "source", ["", "-", "nowhere", "file:///nowhere/at/all", "odd://host/x", "s3://", "gs:///folder"]
)
def test_sources_that_cannot_be_read_are_named(source: str) -> None:
    if "://" in source:
        pytest.importorskip("pyarrow")
    with pytest.raises(InvalidRequest) as caught:
        source_files([source])
    assert caught.value.param == "sources"


@pytest.mark.parametrize("bos", ["document", "window"])
def test_parts_are_those_of_one_process_read_from_where_they_begin(tmp_path: Path, text: Path, bos: str) -> None:
    work = job(tmp_path / "work", text, bos)
    rows = list(placed_rows(work))
    expected = list(plan_parts(rows, work.identity.windows, 20, work.bos_token_id))
    planned = list(plan(work, 20))
    assert len(planned) > 5
    assert [part_of(work, each) for each in planned] == expected
    tokens = UnitTokens(work)
    for row in rows:
        assert len(tokens[row.start : row.start + row.tokens]) == row.tokens


def elsewhere(work: Job, folder: Path) -> Job:
    """The same with its parts at a URL."""
    pytest.importorskip("pyarrow")
    url = folder.as_uri()
    make_folder(url, "parts_at")
    return replace(work, parts_at=url)


@pytest.mark.parametrize(("shards", "at_url"), [(1, False), (3, False), (3, True)])
def test_shards_are_what_one_process_builds(tmp_path: Path, text: Path, shards: int, at_url: bool) -> None:
    lm, work = ToyLanguageModel(), job(tmp_path / "work", text)
    if at_url:
        work = elsewhere(work, tmp_path / "objects")
    whole = Datastore.open(
        build(
            read_documents([text]),
            lm,
            Catalog(tmp_path),
            "toy",
            context_length=16,
            min_context=8,
            batch_tokens=64,
            key_dtype="float32",
            part_entries=20,
        )
    )
    planned = list(plan(work, 20))
    (work.folder / parts.PARTS).mkdir(parents=True)
    for again in (False, True):
        for each in reversed(planned):  # in any order
            assert encode_part(lm, work, UnitTokens(work), each, "node").resumed == again
    rows = list(placed_rows(work))
    keys = []
    for shard in plan_shards(rows, shards, whole.entries):
        names = {"domain": "toy", "version": "v9"}
        mine = [p for p in planned if p.hi > shard.entries[0] and p.lo < shard.entries[1]]
        for again in (False, True):
            begin = rows[shard.documents[0]].place
            assert make_shard(work, shard, begin, mine, lm.tokenizer.json, names).resumed == again
        opened = Datastore.open(work.folder / f"shard-{shard.number:05d}", check="all")
        assert opened.manifest.model == whole.manifest.model
        keys.append(opened.keys)
    np.testing.assert_array_equal(np.concatenate(keys), whole.keys)
    if work.parts_at is not None:
        assert len(list((tmp_path / "objects").iterdir())) == 2 * len(planned)
        assert not list((work.folder / parts.PARTS).glob("*.npy"))
        discard_objects(work.parts_at)
        discard_objects(work.parts_at)  # a command that was killed in it does it again
        assert not (tmp_path / "objects").exists()


@pytest.mark.parametrize("at_url", [False, True])
def test_a_damaged_part_is_found_and_made_again(tmp_path: Path, text: Path, at_url: bool) -> None:
    lm, work = ToyLanguageModel(), job(tmp_path / "work", text)
    (work.folder / parts.PARTS).mkdir(parents=True)
    file = work.folder / parts.PARTS / "00001.keys.npy"
    if at_url:
        work, file = elsewhere(work, tmp_path / "objects"), tmp_path / "objects" / "00001.keys"
    planned = list(plan(work, 20))
    for each in planned:
        encode_part(lm, work, UnitTokens(work), each, "node")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    rows = list(placed_rows(work))
    (shard,) = plan_shards(rows, 1, planned[-1].hi)
    names = {"domain": "toy", "version": "v9"}
    with pytest.raises(DatastoreCorrupt, match=r"00001\.json does not say what its keys are"):
        make_shard(work, shard, rows[0].place, planned, lm.tokenizer.json, names)
    assert not (work.folder / "shard-00000").exists()
    assert [encode_part(lm, work, UnitTokens(work), each, "node").resumed for each in planned[:3]] == [
        True,
        False,
        True,
    ]
    file.unlink()
    with pytest.raises(DatastoreCorrupt, match=r"00001\.keys"):
        make_shard(work, shard, rows[0].place, planned, lm.tokenizer.json, names)
    assert not encode_part(lm, work, UnitTokens(work), planned[1], "node").resumed
    make_shard(work, shard, rows[0].place, planned, lm.tokenizer.json, names)
    Manifest.load(work.folder / "shard-00000")


def test_options_of_a_url_stay_behind_what_it_names(tmp_path: Path) -> None:
    assert below("s3://bucket/folder/?scheme=http", "a/b.txt") == "s3://bucket/folder/a/b.txt?scheme=http"
    assert below("file:///folder", "a") == "file:///folder/a"
    plan_of = Plan(ModelSource("model", "cpu", "float32", "ffn_input"), parts_at="s3://bucket?scheme=http")
    assert plan_of.parts_of("a", "b-v1") == "s3://bucket/a/b-v1.parts?scheme=http"
    assert plan_of.parts_of("a-b", "v1") == "s3://bucket/a-b/v1.parts?scheme=http"
    (tmp_path / "file").touch()
    pytest.importorskip("pyarrow")
    for wrong in ("nowhere", (tmp_path / "file").as_uri()):
        with pytest.raises(InvalidRequest) as caught:
            make_folder(wrong, "parts_at")
        assert caught.value.param == "parts_at"


def test_other_documents_do_not_continue_a_build(tmp_path: Path, text: Path) -> None:
    work = job(tmp_path / "work", text)
    shutil.copyfile(text / "d.txt", text / "a.txt")
    with pytest.raises(Conflict, match="was begun with other documents"):
        job(tmp_path / "work", text)
    lm, unit = ToyLanguageModel(), next(units(source_files([str(text)]), 1))
    with pytest.raises(Conflict, match="other documents"):
        tokenize_unit(work.folder, 0, (replace(unit[0], stamp="0"),), Part.STORE, lm.tokenizer, 300, False)


def test_files_that_were_touched_continue_a_build_when_they_are_the_same(tmp_path: Path, text: Path) -> None:
    work = job(tmp_path / "work", text)
    before = (text / "a.txt").read_text()
    (text / "a.txt").write_text(before.swapcase())
    with pytest.raises(Conflict, match="was begun with other documents"):
        job(tmp_path / "work", text)
    (text / "a.txt").write_text(before)
    os.utime(text / "a.txt", ns=(1, 1))
    assert job(tmp_path / "work", text) == work
    assert not list((tmp_path / "work" / ".build" / "units").glob(".*"))


def test_files_are_cut_into_units_by_size_and_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_UNIT_FILES", 3)
    files = [SourceFile(f"/{i}", str(i), size, "") for i, size in enumerate((5, 5, 1, 20, 1, 1, 1, 1))]
    assert [[file.size for file in unit] for unit in units(files, 10)] == [[5, 5], [1], [20], [1, 1, 1], [1]]


def test_what_two_workers_write_of_one_index_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that was given up goes on beside the one that does its work again."""
    path = sharded(toy_datastore(tmp_path), 2)
    folder = path / Manifest.load(path).shards[0].name
    recipe = family("ivf4")
    index = train_shards([folder], "ivf4", 0, path)
    assert index.file is not None
    trained = path / index.file
    beside: list[Path] = []
    add = type(recipe).add

    def slow(self: Any, trained_bytes: bytes, keys: Any, building: Path, report: Any) -> Any:
        made = add(self, trained_bytes, keys, building, report)
        if not beside:  # another one begins while this one has not finished
            beside.append(building)
            building_now = building.read_bytes()
            add_shard(folder, trained, index)
            assert building.read_bytes() == building_now
        return made

    monkeypatch.setattr(type(recipe), "add", slow)
    add_shard(folder, trained, index)
    assert not [check for check in verify(folder) if check.problem]


@pytest.mark.parametrize("url", ["s3://key:hunter2@bucket/folder", "s3://key:hunter2@[bucket/folder"])
def test_a_password_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidRequest, match="parts_at") as caught:
        make_folder(url, "parts_at")
    assert "hunter2" not in str(caught.value)


def test_a_store_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Away:
        @staticmethod
        def from_uri(url: str) -> None:
            raise OSError(f"no route to the bucket of {url}")

    monkeypatch.setattr("pyarrow.fs.FileSystem", Away)
    with pytest.raises(InvalidRequest, match="s3://bucket/folder cannot be reached: no route"):
        make_folder("s3://bucket/folder", "parts_at")
