"""A version built by a cluster is what one process builds of the same text, whoever is killed meanwhile."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore
from knnlm.datastore.text import read_documents
from knnlm.datastore.verify import verify
from knnlm.index.build import build_index
from knnlm.index.searcher import Searcher
from knnlm.index.sharded_searcher import open_searcher
from tests.cluster.conftest import STORE_BYTES
from tests.lm import tiny_models
from tests.searching import search

WORDS = ("the", "cat", "dog", "mat", "log", "hat", "sat", "ran", "saw", "on", "under", "and", "but", "quickly", "near")
PART_ENTRIES = 200
ROOT = Path(__file__).resolve().parents[2]

# a driver of its own, that can be killed; it says how far it is, a line for each piece of work
DRIVER = """
import json, os, shutil, signal, sys
from pathlib import Path
from knnlm.cluster.build import Plan, Workers, build
from knnlm.cluster.worker import ModelSource
from knnlm.datastore.catalog import Catalog

model, text, store, address, workers, part_entries, dies, parts_at = sys.argv[1:]
plan = Plan(
    ModelSource(model, "cpu", "float32", "ffn_input"), context_length=48, min_context=16, batch_tokens=512,
    part_entries=int(part_entries), index="ivf16,sq8", shards=3, parts_at=parts_at or None,
)
def say(*what):
    print(json.dumps(what), flush=True, file=sys.__stdout__)
def on_progress(p):
    say(p.phase, p.entries_done, p.entries_resumed, p.detail)
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if dies:  # when it is published: the renamed folder still holds what only the build needed
    shutil.rmtree = lambda path, *rest, **_: die() if str(path).endswith("v1/.build") else None
path, _ = build(
    [text], Catalog(store), "toy", plan, Workers(address, int(workers), 1), activate=True, on_progress=on_progress
)
say("done", str(path))
"""


@dataclass(frozen=True)
class Given:
    """A model, text for some 15,000 entries, and what one process builds of it."""

    model: Path
    text: Path
    whole: Path


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    from knnlm.lm.model import LanguageModel

    home = tmp_path_factory.mktemp("cluster")
    model, text = home / "model", home / "text"
    tiny_models.save(tiny_models.random_model(tiny_models.CONFIGS["llama"]()), model)
    text.mkdir()
    rng = random.Random(0)
    for i in range(8):
        words = [rng.choice(WORDS) for _ in range(rng.randint(1, 500))]
        (text / f"f{i}.txt").write_text(" ".join(words), encoding="utf-8")
    with (text / "many.jsonl").open("w", encoding="utf-8") as lines:
        for _ in range(40):
            lines.write(json.dumps({"text": " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 90)))}) + "\n")
    lm = LanguageModel.load(str(model), device="cpu", dtype="float32")
    whole = build(
        read_documents([text]), lm, Catalog(home / "store"), "toy", context_length=48, min_context=16, batch_tokens=512,
        part_entries=PART_ENTRIES,
    )  # fmt: skip
    build_index(whole, "ivf16,sq8")
    return Given(model, text, whole)


class Driver:
    """A process that builds."""

    def __init__(
        self, given: Given, store: Path, address: str, workers: int = 2, dies: bool = False, text: str = "",
        parts_at: str = "",
    ) -> None:  # fmt: skip
        """dies: whether it ends itself between publishing and activating. text: a URL of the given text. parts_at: that
        of a folder."""
        given_or_url = text or given.text
        arguments = map(str, (given.model, given_or_url, store, address, workers, PART_ENTRIES, "yes" * dies, parts_at))
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed with the process
        command = [sys.executable, "-c", DRIVER, *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._errors, text=True, cwd=ROOT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def until(self, phase: str, entries: int) -> None:
        """Read what it says until a phase has this many entries."""
        for said in self._said():
            if said[0] == phase and said[1] >= entries:
                return
        raise AssertionError(f"it ended before {phase} {entries}: {self._error()}")

    def kill(self) -> None:
        """End it at once, if it runs still."""
        self._process.kill()
        self._process.wait(30)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def until_it_dies(self) -> None:
        assert list(self._said())
        assert self._process.wait(60) == -signal.SIGKILL, self._error()

    def _error(self) -> str:
        self._errors.seek(0)
        return self._errors.read()

    def finish(self) -> tuple[Path, list[Any]]:
        """The version, and all that it said of the phase "encode"."""
        encode, path = [], None
        for said in self._said():
            if said[0] == "encode":
                encode.append(said)
            if said[0] == "done":
                path = Path(said[1])
        assert self._process.wait(60) == 0, self._error()
        assert path is not None
        return path, encode

    def _said(self) -> Iterator[list[Any]]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield json.loads(line)


def equal(path: Path, given: Given) -> None:
    """Documents, entries and keys, bit for bit; neighbors by an index that was trained once."""
    one, many = Datastore.open(given.whole), Datastore.open(path, check="all")
    assert many.entries == one.entries
    np.testing.assert_array_equal(np.concatenate([keys for _, keys in many.parts_of_keys()]), one.keys)
    ids = np.arange(one.entries)
    np.testing.assert_array_equal(many.values_of(ids), one.values)
    assert [row for _, row in many.live_rows()] == [row for _, row in one.live_rows()]
    assert not [check for check in verify(path) if check.problem]
    assert sorted(file.name for file in path.iterdir() if file.name.startswith(".")) == []
    queries = one.keys[::997].astype(np.float32)
    found, expected = (
        searcher.search(search("toy", queries, 20, ids=True)).neighbors
        for searcher in (open_searcher(path), Searcher.open(given.whole))
    )
    np.testing.assert_array_equal(found.distances, expected.distances)


def workers_of(cluster: Any) -> list[int]:
    """Processes of the cluster's nodes that hold a model."""
    raylets = {info.process.pid for node in cluster.list_all_nodes() for info in node.all_processes.get("raylet", [])}
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and b"KeyMaker" in (folder / "cmdline").read_bytes():
                fields = (folder / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
                if int(fields[1]) in raylets:
                    found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_the_same_as_one_process(cluster: Any, given: Given, tmp_path: Path) -> None:
    with Driver(given, tmp_path, cluster.address) as driver:
        path, encode = driver.finish()
    manifest = Manifest.load(path)
    assert len(manifest.shards) == 3
    assert encode[-1][1] == manifest.entries
    assert not encode[-1][2]
    assert Catalog(tmp_path).current("toy") == path.name
    equal(path, given)


def test_killed_workers_cost_what_they_were_doing(cluster: Any, given: Given, tmp_path: Path) -> None:
    killed = 0
    with Driver(given, tmp_path, cluster.address) as driver:
        for entries in (1, 2000):
            driver.until("encode", entries)
            for pid in workers_of(cluster)[:1]:
                os.kill(pid, signal.SIGKILL)
                killed += 1
        path, _ = driver.finish()
    assert killed == 2
    equal(path, given)


def test_a_killed_driver_goes_on_and_loses_no_finished_part(cluster: Any, given: Given, tmp_path: Path) -> None:
    killed_at = Manifest.load(given.whole).entries // 3
    with Driver(given, tmp_path, cluster.address) as driver:
        driver.until("encode", killed_at)
    time.sleep(2)  # its workers end with it
    records = list((tmp_path / "toy").glob(".v1.building/.build/parts/*.json"))
    finished = sum(r["hi"] - r["lo"] for r in (json.loads(file.read_bytes()) for file in records))
    assert Catalog(tmp_path).domains() == []
    with Driver(given, tmp_path, cluster.address) as driver:
        path, encode = driver.finish()
    assert finished >= killed_at
    assert encode[-1][2] == finished
    equal(path, given)


def test_a_driver_killed_between_publishing_and_activation_activates_what_is_complete(
    cluster: Any, given: Given, tmp_path: Path
) -> None:
    catalog = Catalog(tmp_path)
    with Driver(given, tmp_path, cluster.address, dies=True) as driver:
        driver.until_it_dies()
    assert catalog.versions("toy") == ["v1"]
    assert catalog.current("toy") is None
    with Driver(given, tmp_path, cluster.address) as driver:
        path, encode = driver.finish()
    assert not encode  # nothing was made again
    assert catalog.versions("toy") == ["v1"]
    assert catalog.current("toy") == path.name == "v1"
    equal(path, given)


@pytest.fixture
def bucket(given: Given) -> Iterator[tuple[Any, str]]:
    """An S3 server in this process with the given text; pyarrow's file system there, and what ends its URLs."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        place = "{}:{}".format(*server.get_host_and_port())
        system = fs.S3FileSystem(endpoint_override=place, scheme="http", allow_bucket_creation=True)
        system.create_dir("corpus/text")
        for file in given.text.iterdir():
            with system.open_output_stream(f"corpus/text/{file.name}") as stream:
                stream.write(file.read_bytes())
        yield system, f"?endpoint_override={place}&scheme=http"
    finally:
        server.stop()


def test_text_and_parts_lie_in_an_object_store(
    cluster: Any, given: Given, tmp_path: Path, bucket: tuple[Any, str]
) -> None:
    from pyarrow import fs

    system, options = bucket

    def objects(folder: str) -> list[str]:
        found = system.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
        return [info.base_name for info in found if info.type == fs.FileType.File]

    text, parts_at = f"s3://corpus/text{options}", f"s3://corpus/parts{options}"
    with Driver(given, tmp_path, cluster.address, text=text, parts_at=parts_at) as driver:
        driver.until("encode", 1500)
    time.sleep(2)  # its workers end with it
    parts = tmp_path / "toy" / ".v1.building" / ".build" / "parts"
    finished = sum(r["hi"] - r["lo"] for r in (json.loads(file.read_bytes()) for file in parts.glob("*.json")))
    assert not list(parts.glob("*.npy"))
    assert {f"{file.stem}.keys" for file in parts.glob("*.json")} <= set(objects("corpus/parts/toy/v1.parts"))
    with Driver(given, tmp_path, cluster.address, text=text, parts_at=parts_at) as driver:
        path, encode = driver.finish()
    assert finished >= 1500
    assert encode[-1][2] == finished
    equal(path, given)
    assert not objects("corpus/parts")
    assert len(objects("corpus/text")) == len(list(given.text.iterdir()))


def test_a_node_that_is_lost_is_done_without(cluster: Any, given: Given, tmp_path: Path) -> None:
    with Driver(given, tmp_path, cluster.address, workers=3) as driver:
        driver.until("encode", 1)
        _, *others = cluster.list_all_nodes()
        cluster.remove_node(others[-1], allow_graceful=False)
        try:
            path, _ = driver.finish()
        finally:
            cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES, node_ip_address="127.0.0.1")
    equal(path, given)


def test_the_command_on_a_cluster_of_its_own(given: Given, tmp_path: Path) -> None:
    """Text from a URL, shards by their bytes; and the commands that read the version."""

    def knnlm(*arguments: str) -> Any:
        command = [sys.executable, "-m", "knnlm.cli.main", *arguments, "--store", str(tmp_path), "--json"]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    built = knnlm(
        "cluster", "build", "toy", given.text.as_uri(), "--model", str(given.model), "--address", "local",
        "--worker-cpus", "1", "--workers", "1", "--shard-bytes", "500000", "--index", "none", "--context-length", "48",
        "--min-context", "16", "--batch-tokens", "512",
    )  # fmt: skip
    entries = Manifest.load(given.whole).entries
    assert built["entries"] == entries
    assert built["shards"] == -(-entries * (64 + 8) // 500_000)
    assert knnlm("show", "toy", "--entry", "5")["shown"][0]["entry"] == 5
    assert knnlm("verify", "toy")[0]["problems"] == []
    many, one = Datastore.open(tmp_path / "toy" / "v1"), Datastore.open(given.whole)
    assert [row for _, row in many.live_rows()] == [row for _, row in one.live_rows()]
    np.testing.assert_allclose(  # other parts, so other batches
        np.concatenate([keys for _, keys in many.parts_of_keys()]).astype(np.float32), one.keys, rtol=1e-2, atol=1e-2
    )
