"""Shards searched by a Ray cluster: the same answers as in one process, while replicas, nodes and versions change."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnlm.clients.rpc import GrpcDatastore
from knnlm.datastore.catalog import Catalog
from knnlm.errors import InvalidRequest, Unavailable
from knnlm.index.searcher import Searcher
from knnlm.local import LocalLanguageModel
from knnlm.messages import PassagesRequest, SearchRequest, SearchResult
from knnlm.mixer import Mixer
from knnlm.neighbors import neighbor_log_probs
from knnlm.options import DomainOptions, KnnOptions, SearchOptions
from knnlm.testing import TEXTS, ToyLanguageModel, toy_datastore
from tests.cluster.gateways import (
    answering,
    eventually,
    gateway,
    get,
    kill,
    load,
    more,
    new_domain,
    probe,
    replica_pids,
    request,
    same,
    wait_until,
)
from tests.services.processes import ROOT, Running, environment
from tests.sharding import sharded

LONG = tuple(f"{text} {number} times, and again {text}" for number in range(12) for text in TEXTS)
SHARDS = 2


@dataclass
class Served:
    """A gateway over a store with the versions v1 and v2 of SHARDS shards and `whole`, which holds what v1 does.
    expected: the answers to `request(domain)`."""

    store: Path
    domain: str
    address: str
    running: Running
    expected: dict[str, SearchResult]

    @property
    def target(self) -> str:
        return self.running.grpc


@pytest.fixture(scope="module")
def served(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:  # Any: a Ray cluster
    store, domain = tmp_path_factory.mktemp("store"), new_domain()
    whole = toy_datastore(store, texts=LONG, domain=domain, version="whole", activate=False)
    other = toy_datastore(store, texts=LONG[:24], domain=domain, version="other", activate=False)
    sharded(whole, SHARDS, version="v1", recipe="ivf16")
    sharded(other, SHARDS, version="v2", recipe="ivf16")
    Catalog(store).activate(domain, "v1")
    expected = {}
    for version, alike in (("v1", whole), ("v2", other)):
        found = Searcher.open(alike).search(request(domain))
        expected[version] = replace(found, version=version)
    flags = ("--shard-min-replicas", "2", "--shard-max-replicas", "2", "--shard-replicas-per-node", "1")
    scaling = (
        "--shard-target-requests", "0.2", "--shard-upscale-delay-s", "1", "--shard-downscale-delay-s", "2",
        "--cluster-searches", "8",
    )  # fmt: skip
    with gateway(store, cluster.address, *flags, *scaling, "--grace-s", "1") as running:
        yield Served(store, domain, cluster.address, running, expected)


async def test_answers_are_those_of_one_index_in_one_process(served: Served) -> None:
    domain = served.domain
    whole = Searcher.open(served.store / domain / "whole")
    rng = np.random.default_rng(1)
    n = whole.manifest.entries
    stored = whole.datastore.keys_of(np.arange(0, n, n // 8)[:8])
    plain = SearchRequest(domain, stored, SearchOptions(k=40), ids=True)
    entries = np.arange(0, n, n // 8)[:8].astype(np.int64)
    asked = [
        plain,
        replace(plain, ids=False),
        replace(plain, queries=stored.astype(np.float16)),
        replace(plain, queries=rng.standard_normal((2000, 16)).astype(np.float32), options=SearchOptions(k=3)),
        replace(plain, options=SearchOptions(k=4000)),
        replace(plain, passages=3, passage_tokens=5),
        replace(plain, exclude_entries=entries),
        replace(plain, exclude_entries=entries, options=SearchOptions(k=40, exclude_own_documents=True)),
        replace(plain, options=SearchOptions(k=40, exclude_documents=("0", "40"))),
        replace(plain, follow=np.stack([entries, entries[::-1] + 1], axis=1)),
    ]
    async with GrpcDatastore(served.target) as datastore:
        for one in asked:
            every = replace(one.options, nprobe=16) if one.follow is None else one.options
            found = await datastore.search(replace(one, options=every))
            wanted = whole.search(one)
            assert same(found, wanted), one
            assert np.allclose(
                neighbor_log_probs(found.neighbors, 1.0).dense(258),
                neighbor_log_probs(wanted.neighbors, 1.0).dense(258),
                atol=1e-6,
            )
            assert repr(list(found.passages)) == repr(list(wanted.passages))
        texts = await datastore.passages(PassagesRequest(domain, "v1", entries[::-1].copy(), 4))
        assert repr(texts) == repr(whole.passages(PassagesRequest(domain, "whole", entries[::-1].copy(), 4)))
        for wrong, param in (
            (replace(plain, options=SearchOptions(k=4, exclude_documents=("no such",))), "exclude_documents"),
            (replace(plain, exclude_entries=entries + n), "exclude_entries"),
            (replace(plain, options=SearchOptions(k=4, ef_search=7)), "ef_search"),
            (replace(plain, queries=stored[:, :3]), "queries"),
        ):
            with pytest.raises(InvalidRequest) as problem:
                await datastore.search(wrong)
            assert problem.value.param == param


async def test_a_killed_replica_fails_no_request_and_is_replaced(served: Served) -> None:
    application = f"{served.domain}@v1"
    async with load(served.target, request(served.domain), served.expected) as seen:
        await more(seen)
        for shard in range(SHARDS):
            victim, survivor = replica_pids(application, shard)
            kill([victim])
            await more(seen)
            await eventually(lambda s=shard, v=victim: len(set(replica_pids(application, s)) - {v}) == 2)  # type: ignore[misc]
            assert survivor in replica_pids(application, shard)
    assert not seen.failures
    assert not seen.wrong


async def test_versions_change_under_load_and_back(served: Served) -> None:
    async with load(served.target, request(served.domain), served.expected) as seen:
        await more(seen)
        for version in ("v2", "v1"):  # the second time it is a rollback
            before = seen.answers.get(version, 0)
            await asyncio.to_thread(Catalog(served.store).activate, served.domain, version)
            await eventually(lambda v=version, b=before: seen.answers.get(v, 0) > b + 10)  # type: ignore[misc]
        await eventually(lambda: not replica_pids(f"{served.domain}@v2"))  # deleted once nobody needs it
        await more(seen)
    assert not seen.failures
    assert not seen.wrong
    assert set(seen.answers) == {"v1", "v2"}


async def test_a_second_gateway_uses_what_is_deployed_and_needs_no_first_one(served: Served) -> None:
    pids = replica_pids(f"{served.domain}@v1")
    with gateway(served.store, served.address) as running:  # asks for one replica of each
        async with GrpcDatastore(running.grpc) as datastore:
            assert same(await datastore.search(request(served.domain)), served.expected["v1"])
        running.process.terminate()
        await asyncio.to_thread(running.process.wait, 60)
    assert replica_pids(f"{served.domain}@v1") == pids
    async with GrpcDatastore(served.target) as datastore:
        assert same(await datastore.search(request(served.domain)), served.expected["v1"])


async def test_replicas_are_scaled_by_hand_and_come_and_go_with_load(served: Served) -> None:
    application = f"{served.domain}@v1"

    async def scaled(*bounds: str) -> str:
        return await asyncio.to_thread(knnlm, "cluster", "scale", served.domain, *bounds, *place(served))

    try:
        async with load(served.target, request(served.domain), served.expected) as busy:
            await more(busy)
            assert "1 to 1" in await scaled("1")
            await eventually(lambda: len(replica_pids(application)) == SHARDS)
            assert "1 to 3" in await scaled("1", "--max-replicas", "3")
            await eventually(lambda: len(replica_pids(application)) == 3 * SHARDS)
            await more(busy)
        async with load(served.target, request(served.domain), served.expected, callers=1, pause=1.0) as calm:
            await eventually(lambda: len(replica_pids(application)) == SHARDS)
            await more(calm, 2)
    finally:
        await scaled("2")
    for met in (busy, calm):
        assert not met.failures
        assert not met.wrong


async def test_a_lost_node_fails_no_request(served: Served, cluster: Any) -> None:
    application = f"{served.domain}@v1"
    node = next(iter(cluster.worker_nodes))
    await eventually(lambda: answering(served.running, served.domain) == [2] * SHARDS)
    try:
        async with load(served.target, request(served.domain), served.expected) as seen:
            await more(seen)
            await asyncio.to_thread(cluster.remove_node, node, False)
            await more(seen, 100)
            await eventually(lambda: len(replica_pids(application)) >= SHARDS)
            await more(seen)
    finally:
        cluster.add_node(num_cpus=2, object_store_memory=100 << 20, node_ip_address="127.0.0.1")
    assert not seen.failures
    assert not seen.wrong
    await eventually(lambda: answering(served.running, served.domain) == [2] * SHARDS)


async def test_a_shard_without_a_replica_fails_by_name_and_comes_back(served: Served) -> None:
    domain, lm = served.domain, ToyLanguageModel()
    folder = served.store / domain / "v1" / "shard-00001"
    hidden = folder.with_name(".hidden")
    folder.rename(hidden)  # so that no replica can be started
    try:
        async with GrpcDatastore(served.target) as datastore:
            while probe(served.running, "readyz") == 200:
                kill(replica_pids(f"{domain}@v1", 1))
                await asyncio.sleep(0.5)
            with pytest.raises(Unavailable, match=f"shard 1 of {SHARDS} of {domain} v1 has no replica"):
                await datastore.search(request(domain))
            assert f"shard 1 of {SHARDS}" in get(served.running, "readyz")
            assert f'knnlm_shard_replicas{{domain="{domain}",shard="1"}} 0.0' in get(served.running, "metrics")
            assert (await datastore.get_domain(domain)).state.startswith("degraded: shard 1 of")
            mixer = Mixer(LocalLanguageModel(lm), datastore, lm.info)
            knn = KnnOptions((DomainOptions(domain, temperature=1.0, lmbda=0.5),), on_datastore_error="lm_only")
            next_tokens = await mixer.next_token([np.array([2, 3], np.int32)], knn)
            assert f"shard 1 of {SHARDS} of {domain}" in (next_tokens.degraded or "")
    finally:
        hidden.rename(folder)
    async with GrpcDatastore(served.target) as datastore:
        await asyncio.to_thread(wait_until, lambda: probe(served.running, "readyz") == 200)
        assert same(await datastore.search(request(domain)), served.expected["v1"])


def test_a_version_that_cannot_be_opened_leaves_the_other(served: Served) -> None:
    broken = sharded(served.store / served.domain / "other", SHARDS, version="broken")
    (broken / "shard-00001" / "keys.npy").write_bytes(b"no keys")
    Catalog(served.store).activate(served.domain, "broken")
    try:
        wait_until(lambda: "stale" in get(served.running, f"v1/domains/{served.domain}"))
        assert "keys.npy" in json.loads(get(served.running, f"v1/domains/{served.domain}"))["state"]
    finally:
        Catalog(served.store).activate(served.domain, "v1")
    wait_until(lambda: "ready" in get(served.running, f"v1/domains/{served.domain}"))
    wait_until(lambda: not replica_pids(f"{served.domain}@broken"))


def test_status_names_versions_and_their_replicas(served: Served) -> None:
    rows = json.loads(knnlm("cluster", "status", "--json", *place(served)))
    (row,) = (row for row in rows if row["domain"] == served.domain)
    assert (row["version"], row["shards"], row["replicas"]) == ("v1", SHARDS, [2, 2])


def place(served: Served) -> tuple[str, ...]:
    return ("--address", served.address)


def knnlm(*arguments: str) -> str:
    """What the command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "knnlm.cli.main", *arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=120, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return done.stdout
