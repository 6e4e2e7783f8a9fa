"""Gateways as their users run them, over a Ray cluster of this machine, and what the tests do to the cluster."""

import asyncio
import os
import re
import secrets
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from knnlm.clients.rpc import GrpcDatastore
from knnlm.messages import SearchRequest, SearchResult
from knnlm.options import SearchOptions
from tests.services.processes import Running, process

SECONDS = 300.0  # the longest that anything here may take
CALLERS = 3
FLAGS = ("--shard-cpus", "0.1", "--watch-interval-s", "0.2", "--request-timeout-s", "60")


def new_domain() -> str:
    """A name that no other test on this machine uses: processes are found by it."""
    return f"toy-{secrets.token_hex(4)}"


@contextmanager
def gateway(store: Path, address: str, *flags: str) -> Iterator[Running]:
    with process("datastore", "--store", str(store), "--cluster", address, *FLAGS, *flags) as running:
        log = running.process.stderr
        assert log is not None
        threading.Thread(target=deque, args=(log, 0), daemon=True).start()  # or the pipe would be full
        wait_until(lambda: probe(running, "livez") == 200 and "loading" not in get(running, "readyz"))
        yield running


def probe(running: Running, route: str) -> int:
    return httpx.get(f"{running.http}/{route}", timeout=5).status_code


def get(running: Running, route: str) -> str:
    return httpx.get(f"{running.http}/{route}", timeout=5).text


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.1)


def replica_pids(application: str, shard: int | None = None) -> list[int]:
    """The processes of replicas of an application, of one shard or of all."""
    number = r"\d+" if shard is None else shard
    title = re.compile(rf"ServeReplica:{re.escape(application)}:shard-{number}(?!\d)")  # what it does may follow
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):  # ended meanwhile
                if title.search((folder / "cmdline").read_text(errors="replace")):
                    found.append(int(folder.name))
    return sorted(found)


def answering(running: Running, domain: str) -> list[int]:
    """How many replicas of each shard answer, as the gateway knows it."""
    counts = re.findall(rf'knnlm_shard_replicas{{domain="{domain}",shard="\d+"}} (\d+)', get(running, "metrics"))
    return [int(count) for count in counts]


def kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.kill(pid, signal.SIGKILL)


def request(domain: str, **more: Any) -> SearchRequest:  # Any: fields of SearchRequest
    queries = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    return SearchRequest(domain, **{"queries": queries, "options": SearchOptions(k=16), "ids": True, **more})


@dataclass
class Load:
    """What callers met. answers: by version. wrong: answers that are not true to the version they name."""

    answers: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.answers.values())


@asynccontextmanager
async def load(
    target: str, asked: SearchRequest, expected: dict[str, SearchResult], *, callers: int = CALLERS, pause: float = 0.0
) -> AsyncIterator[Load]:
    """Callers that ask until the block is left, with a pause (seconds) after every answer; each is compared
    with that of its version."""
    seen, ended = Load(), asyncio.Event()

    async def ask(datastore: GrpcDatastore) -> None:
        while not ended.is_set():
            try:
                result = await datastore.search(asked)
                if not same(result, expected[result.version]):
                    seen.wrong.append(result.version)
            except Exception as err:  # noqa: BLE001  counted, and shown by the test
                seen.failures.append(err)
                await asyncio.sleep(0.05)
                continue
            seen.answers[result.version] = seen.answers.get(result.version, 0) + 1
            await asyncio.sleep(pause)

    async with GrpcDatastore(target) as datastore:
        tasks = [asyncio.create_task(ask(datastore)) for _ in range(callers)]
        try:
            yield seen
        finally:
            ended.set()
            await asyncio.gather(*tasks)


def same(one: SearchResult, other: SearchResult) -> bool:
    """Whether two answers have the same neighbors, distances to 1e-5 of each."""
    a, b = one.neighbors, other.neighbors
    return (
        a.values.shape == b.values.shape
        and bool((a.values == b.values).all())
        and (a.ids is None or b.ids is None or bool((a.ids == b.ids).all()))
        and bool(np.allclose(a.distances, b.distances, rtol=1e-5, atol=1e-5))
    )


async def more(seen: Load, answers: int = 20) -> None:
    """Wait for this many further answers."""
    enough = seen.total + answers
    await eventually(lambda: seen.total >= enough)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110  of other processes
            await asyncio.sleep(0.1)
