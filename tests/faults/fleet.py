"""Replicas of the services as processes on fixed ports: started, killed, started again in the same place."""

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.reference import POCKET
from tests.services.processes import ROOT, command, environment

__all__ = ["Fleet", "Replica", "fleet", "lone_datastore", "until"]

START_SECONDS = 120.0  # the lm service imports torch


def until(condition: Callable[[], bool], within: float, what: str) -> None:
    """Raises AssertionError when it does not come true."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() < begun + within, f"{what}: not within {within:g} s"
        time.sleep(0.02)


@dataclass
class Replica:
    """One process of a service. log: of all its lives. Its ports stay the same."""

    service: str
    number: int
    flags: Sequence[str]
    log: Path
    http_port: int
    grpc_port: int | None
    process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)
    lives: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def pid(self) -> int:
        assert self.process is not None, f"{self.service} {self.number} does not run"
        return self.process.pid

    def start(self) -> None:
        ports = ["--port", str(self.http_port)]
        ports += [] if self.grpc_port is None else ["--grpc-port", str(self.grpc_port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command(self.service, *ports, *self.flags), stderr=log, env=environment(), cwd=ROOT
            )
        self.lives += 1

    def ready(self) -> bool:
        """Whether it takes requests. AssertionError with the end of its log when it has ended instead."""
        assert self.process is not None
        assert self.process.poll() is None, f"{self.service} ended: {self.log.read_text()[-2000:]}"
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def wait(self) -> None:
        until(self.ready, START_SECONDS, f"{self.service} {self.number} is ready")

    def kill(self) -> None:
        """SIGKILL: no draining, no goodbye."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def terminate(self, within: float) -> int:
        """SIGTERM, and the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=within)


@dataclass
class Fleet:
    lms: list[Replica]
    datastores: list[Replica]
    aggregator: Replica

    @property
    def replicas(self) -> list[Replica]:
        return [*self.lms, *self.datastores, self.aggregator]


@contextmanager
def fleet(
    store: Path,
    logs: Path,
    *,
    lms: int = 1,
    datastores: int = 1,
    lm_flags: Sequence[str] = (),
    datastore_flags: Sequence[str] = (),
    aggregator_flags: Sequence[str] = (),
) -> Iterator[Fleet]:
    """All ready; all killed on leaving."""
    logs.mkdir(parents=True, exist_ok=True)
    lm_settings = ["--model", str(POCKET), "--device", "cpu", "--log-level", "warning", *lm_flags]
    store_settings = ["--store", str(store), "--log-level", "warning", *datastore_flags]
    models = [_replica("lm", n, lm_settings, logs) for n in range(lms)]
    stores = [_replica("datastore", n, store_settings, logs) for n in range(datastores)]
    targets = [
        "--lm-target", ",".join(replica.target for replica in models),
        "--datastore-target", ",".join(replica.target for replica in stores),
        "--log-level", "warning", *aggregator_flags,
    ]  # fmt: skip
    whole = Fleet(models, stores, _replica("aggregator", 0, targets, logs))
    with ExitStack() as stack:
        for replica in whole.replicas:
            stack.callback(_end, replica)
            replica.start()
        for replica in whole.replicas:
            replica.wait()
        yield whole


@contextmanager
def lone_datastore(store: Path, logs: Path, flags: Sequence[str] = ()) -> Iterator[Replica]:
    """A datastore service alone, ready."""
    logs.mkdir(parents=True, exist_ok=True)
    replica = _replica("datastore", 0, ["--store", str(store), "--log-level", "warning", *flags], logs)
    try:
        replica.start()
        replica.wait()
        yield replica
    finally:
        _end(replica)


def _replica(service: str, number: int, flags: Sequence[str], logs: Path) -> Replica:
    http, grpc = _free_ports(2)
    log = logs / f"{service}{number}.log"
    return Replica(service, number, flags, log, http, None if service == "aggregator" else grpc)


def _free_ports(count: int) -> list[int]:
    """Below those that the system gives to outgoing connections, so that a replica finds its own free again."""
    found: list[int] = []
    while len(found) < count:
        port = _CANDIDATES.pop()
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
    return found


_CANDIDATES = list(range(21_000, 29_000))


def _end(replica: Replica) -> None:
    if replica.process is not None and replica.process.poll() is None:
        replica.kill()
