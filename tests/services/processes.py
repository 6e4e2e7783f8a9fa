"""A service as its users run it: a process of its own, found by what it logs."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ADDRESSES = re.compile(r"event=listening http=(?P<http>\S+)(?: grpc=(?P<grpc>\S+))?")


@dataclass
class Running:
    process: "subprocess.Popen[str]"
    http: str
    grpc: str


def command(service: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", f"services.{service}", *flags]


def environment() -> dict[str, str]:
    """Without settings of ours, so that those of whoever runs the tests do not matter."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KNNLM_")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@contextmanager
def process(service: str, *flags: str) -> Iterator[Running]:
    """Running and listening, perhaps not yet ready; killed if the test has not ended it."""
    started = subprocess.Popen(
        command(service, "--port", "0", *([] if service == "aggregator" else ["--grpc-port", "0"]), *flags),
        stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT,
    )  # fmt: skip
    try:
        assert started.stderr is not None
        seen = []
        for line in started.stderr:
            seen.append(line)
            found = ADDRESSES.search(line)
            if found:
                yield Running(started, f"http://{found['http']}", found["grpc"] or "")
                break
        else:
            raise AssertionError(f"the {service} service ended before it listened: {''.join(seen)}")
    finally:
        started.kill()
        started.wait()
        if started.stderr is not None:
            started.stderr.close()


def finished(service: str, flags: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """A run that is expected to end by itself."""
    return subprocess.run(
        command(service, *flags), capture_output=True, text=True, timeout=120, env=environment(), cwd=ROOT, check=False
    )
