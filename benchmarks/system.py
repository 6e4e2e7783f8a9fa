"""The three services as their users run them, for programs that measure them: a process each, on ports that are free.

A service runs `threads` threads for its own arithmetic, on the same cores as the others.
"""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.harness import ROOT

__all__ = ["THREADS", "Running", "System", "service", "system"]

THREADS = 2  # what every figure is measured with
READY_SECONDS = 120.0
STOP_SECONDS = 20.0
LISTENING = re.compile(r"event=listening http=(?P<http>\S+)(?: grpc=(?P<grpc>\S+))?")


@dataclass(frozen=True)
class Running:
    """One service. http: base address; grpc: host:port, empty for the aggregator. log: what it has said."""

    pid: int
    http: str
    grpc: str
    log: Path

    def cpu_seconds(self) -> float:
        """Processor time so far, of all its threads. Linux only: elsewhere NaN."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        except OSError:
            return float("nan")
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class System:
    lm: Running
    datastore: Running
    aggregator: Running


@contextmanager
def system(
    store: Path, model: Path, logs: Path, *, threads: int = THREADS, lm_for_datastore: bool = False
) -> Iterator[System]:
    """All three, ready; they are stopped on leaving. logs: the folder that their log files go to. lm_for_datastore: so
    that documents can be added."""
    with ExitStack() as stack:
        lm = stack.enter_context(service("lm", logs, "--model", str(model), threads=threads))
        flags = ["--store", str(store), *(["--lm-target", lm.grpc] if lm_for_datastore else [])]
        datastore = stack.enter_context(service("datastore", logs, *flags, threads=threads))
        targets = ["--lm-target", lm.grpc, "--datastore-target", datastore.grpc]
        yield System(lm, datastore, stack.enter_context(service("aggregator", logs, *targets, threads=1)))


@contextmanager
def service(name: str, logs: Path, *flags: str, threads: int = THREADS) -> Iterator[Running]:
    """One service, ready. Raises RuntimeError with the end of its log when it does not get so far."""
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{name}.log"
    ports = ["--port", "0", *([] if name == "aggregator" else ["--grpc-port", "0"])]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", f"services.{name}", *ports, *flags],
            cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=_environment(threads),
        )  # fmt: skip
    try:
        yield _ready(name, process, log)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        process.kill()
        process.wait()


def _environment(threads: int) -> dict[str, str]:
    """Without settings of whoever runs this, so that they do not change a figure."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KNNLM_", "OMP_", "GOMP_"))}
    return {**kept, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}


def _ready(name: str, process: "subprocess.Popen[bytes]", log: Path) -> Running:
    deadline = time.monotonic() + READY_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        found = LISTENING.search(log.read_text(errors="replace"))
        if found is not None:
            running = Running(process.pid, f"http://{found['http']}", found["grpc"] or "", log)
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{running.http}/readyz", timeout=5).status_code == 200:
                    return running
        time.sleep(0.05)
    tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-5:])
    raise RuntimeError(f"the {name} service did not become ready; the end of its log:\n{tail}")
