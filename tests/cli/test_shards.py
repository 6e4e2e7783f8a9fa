"""A version of shards on the command line: every command that reads takes it, those that cannot say what to do; and
`knnlm cluster` where it cannot begin."""

import sys
from pathlib import Path
from typing import Any

import pytest

from knnlm.datastore.catalog import Catalog
from knnlm.datastore.manifest import Manifest
from tests.cli.conftest import Knnlm
from tests.sharding import sharded


@pytest.fixture
def shards(store: Path) -> Path:
    """Version v2 of "toy" in three shards, the current one, with the tuning of v1."""
    path = sharded(store / "toy" / "v1", 3, version="v2", recipe="ivf4")
    Catalog(store).activate("toy", "v2")
    return path


def test_it_is_shown_and_verified(knnlm: Knnlm, shards: Path) -> None:
    entries = Manifest.load(shards).entries
    shown = knnlm("show", "toy", "--entry", entries - 1, "--json").json
    assert [s["name"] for s in shown["shards"]] == ["shard-00000", "shard-00001", "shard-00002"]
    assert shown["memory"]["ivf4"] > 0
    text = knnlm("show", "toy").out
    assert "3, of " in text
    files = [file for file in shards.rglob("*") if file.is_file() and file.name != "manifest.json"]
    assert f"{sum(file.stat().st_size for file in files):,}" in text
    one = knnlm("show", "toy", "--version", "v1", "--entry", entries - 1, "--json").json
    assert shown["shown"] == one["shown"]
    assert knnlm("verify", "toy", "--json").json == [{"domain": "toy", "version": "v2", "problems": [], "remarks": []}]
    (shards / "shard-00001" / "values.npy").unlink()
    damaged = knnlm("verify", "toy")
    assert (damaged.code, "shard-00001/values.npy" in damaged.out) == (1, True)


def test_it_is_tuned_and_evaluated_as_one(knnlm: Knnlm, shards: Path, corpus: Path) -> None:
    command = ("tune", "toy", corpus, "--part", "tune", "--k", 8, "--exact-queries", 0, "--json")
    knnlm("index", "build", "toy", "--recipe", "flat")
    found, expected = knnlm(*command).json, knnlm(*command, "--version", "v1").json
    assert found["knn_perplexity"] == pytest.approx(expected["knn_perplexity"], rel=1e-6)
    assert Manifest.load(shards).tuning is not None
    knnlm("index", "build", "toy", "--recipe", "ivf4")
    tuned = knnlm("tune", "toy", corpus, "--part", "tune", "--k", 8, "--json").json  # measured beside exact search
    assert tuned["quality"]
    served = knnlm("eval", corpus, "--part", "report", "--domain", "toy", "--json").json
    assert served["knn"]["perplexity"] < served["lm"]["perplexity"]
    explained = knnlm("next", "the cat sat on the", "--domain", "toy", "--json").json
    assert explained


def test_indexes_are_built_chosen_and_removed(knnlm: Knnlm, shards: Path) -> None:
    assert knnlm("index", "build", "toy", "--recipe", "sq8", "--beside", "--json").json["indexes"] == ["ivf4", "sq8"]
    assert knnlm("index", "use", "toy", "sq8", "--json").json["indexes"] == ["sq8", "ivf4"]
    assert knnlm("index", "remove", "toy", "ivf4", "--json").json["indexes"] == ["sq8"]
    assert [i.recipe for i in Manifest.load(shards / "shard-00002").indexes] == ["sq8"]
    assert knnlm("verify", "toy").code == 0


@pytest.mark.parametrize("command", [("add", "toy", "CORPUS"), ("forget", "toy", "d0"), ("compact", "toy")])
def test_what_would_change_it_is_refused(knnlm: Knnlm, shards: Path, corpus: Path, command: tuple[str, ...]) -> None:
    answer = knnlm(*(str(corpus) if word == "CORPUS" else word for word in command))
    assert answer.code == 1
    assert "shards do not change: build another version of all documents with `knnlm cluster build toy`" in answer.err


def test_a_report_is_refused_before_the_model_is_loaded(knnlm: Knnlm, shards: Path, corpus: Path) -> None:
    answer = knnlm("index", "report", "toy", corpus, "--model", "nowhere")
    assert (answer.code, "has 3 shards" in answer.err) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--store", "s3://bucket/store"), "is an object store: the store is a folder that every node sees"),
        (("--shards", "2", "--shard-bytes", "10"), "either shards or shard_bytes"),
        (("--shards", "0"), "shards must be >= 1, got 0"),
        (("--worker-cpus", "0"), "worker_cpus must be >= 1"),
        (("--index", "odd"), "unknown index recipe 'odd'"),
    ],
)
def test_a_cluster_build_that_cannot_be_is_refused(
    knnlm: Knnlm, store: Path, corpus: Path, options: tuple[str, ...], message: str
) -> None:
    answer = knnlm("cluster", "build", "new", corpus, "--address", "local", *options)
    assert (answer.code, message in answer.err) == (2, True), answer.err


def test_standard_input_is_no_source_of_a_cluster(knnlm: Knnlm, store: Path) -> None:
    answer = knnlm("cluster", "build", "new", "-")
    assert (answer.code, "standard input is read by one process" in answer.err) == (2, True)


def test_what_to_install_is_said_where_ray_is_missing(
    knnlm: Knnlm, store: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing: Any = None  # what makes importing it fail
    monkeypatch.setitem(sys.modules, "ray", missing)
    answer = knnlm("cluster", "build", "new", corpus)
    assert (answer.code, "pip install 'knnlm[cluster]'" in answer.err) == (1, True)


@pytest.mark.parametrize("command", [("serve", "--replicas", 3), ("scale", "toy", 3)])
def test_fewer_replicas_at_most_than_at_least_are_refused(knnlm: Knnlm, store: Path, command: tuple[str, ...]) -> None:
    answer = knnlm("cluster", *command, "--max-replicas", 1)
    assert (answer.code, "--max-replicas must be at least 3, got 1" in answer.err) == (2, True)
