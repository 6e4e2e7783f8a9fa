"""docker-compose.yml on the engine of this machine: built, started, scaled, hurt, and taken down again.

Nothing of the file is replaced. An override of the test's own adds where pip finds the wheels that this environment
was made of, so that the images get the same builds without fetching them again.
"""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LARGE = ("torch",)  # wheels worth handing over; all others come from the package index
SERVICES = ("lm", "datastore", "memory", "aggregator")
FOUND = ROOT / "build" / "compose" / "wheels"


class Stack:
    """One project of compose. `environment`: the variables that docker-compose.yml reads."""

    def __init__(self, files: list[Path], environment: dict[str, str]) -> None:
        self._files = files
        self._environment = {**os.environ, **environment}

    def compose(self, *arguments: str, timeout: float = 900) -> str:
        files = [part for file in self._files for part in ("-f", str(file))]
        return run(["docker", "compose", *files, *arguments], self._environment, timeout)

    def up(self, **replicas: int) -> None:
        """Start what is not running, so many of each, and wait until all are healthy."""
        scale = [part for name, count in replicas.items() for part in ("--scale", f"{name}={count}")]
        self.compose("up", "--detach", "--wait", "--no-recreate", *scale)

    def containers(self, service: str) -> list[str]:
        """Names of those that run."""
        return self.compose("ps", "--status", "running", "--format", "{{.Name}}", service).split()

    def docker(self, *arguments: str, timeout: float = 120) -> str:
        return run(["docker", *arguments], self._environment, timeout)

    def metric(self, container: str, port: int, name: str) -> float:
        """The sum of a counter over its labels, asked for inside the container."""
        code = f"import urllib.request as r; print(r.urlopen('http://127.0.0.1:{port}/metrics').read().decode())"
        lines = self.docker("exec", container, "python", "-c", code).splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    def inspect(self, container: str) -> Any:  # JSON
        return json.loads(self.docker("inspect", container))[0]


def run(command: list[str], environment: dict[str, str], timeout: float) -> str:
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def need_engine() -> None:
    """Skip the test where there is no Docker engine; fail it there when KNNLM_TEST_COMPOSE asks for one."""
    problem = engine_problem()
    if problem is not None:
        assert "KNNLM_TEST_COMPOSE" not in os.environ, f"{problem}: `make test-compose` needs an engine"
        pytest.skip(problem)


def engine_problem() -> str | None:
    """Why there is no engine to test on."""
    if shutil.which("docker") is None:
        return "there is no docker command"
    asked = subprocess.run(["docker", "compose", "version"], capture_output=True, text=True, check=False)
    if asked.returncode:
        return f"docker compose does not work: {asked.stderr.strip()[:200]}"
    asked = subprocess.run(["docker", "info"], capture_output=True, text=True, timeout=60, check=False)
    return f"the docker engine does not answer: {asked.stderr.strip()[:200]}" if asked.returncode else None


@contextmanager
def started(store: Path, work: Path, environment: dict[str, str]) -> Iterator[Stack]:
    """Images built, nothing running yet; everything removed at the end, logs of the containers kept in `work`."""
    with _wheels_served() as options:
        override = work / "wheels.yml"
        build = {"build": {"network": "host"}}
        override.write_text(json.dumps({"services": dict.fromkeys(SERVICES, build)}))
        given = {"KNNLM_STORE_DIR": str(store), "KNNLM_STORE_USER": f"{os.getuid()}:{os.getgid()}", **environment}
        stack = Stack([ROOT / "docker-compose.yml", override], {**given, "PIP_OPTIONS": options})
        stack.compose("down", "--volumes", "--remove-orphans")
        stack.compose("build")
    try:
        yield stack
    finally:
        (work / "logs.txt").write_text(stack.compose("logs", "--no-color"), encoding="utf-8")
        stack.compose("down", "--volumes", "--remove-orphans", "--timeout", "20")


@contextmanager
def _wheels_served() -> Iterator[str]:
    """Options for pip inside the build: the large wheels as pip on this machine gets them, over loopback."""
    FOUND.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    run([*command, "--constraint", "requirements.lock", "--dest", str(FOUND), *LARGE], dict(os.environ), 600)
    handler = partial(_Quiet, directory=str(FOUND))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"--find-links http://127.0.0.1:{server.server_address[1]}/ --trusted-host 127.0.0.1"
        finally:
            server.shutdown()
            thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        del format, args
