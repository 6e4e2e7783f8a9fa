"""What is set for the whole process, as the libraries themselves report it."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from services.runtime.process import configure_malloc, set_omp_wait_policy

ROOT = Path(__file__).parents[3]
FAULTS = """
import resource, sys
from services.runtime.process import configure_malloc
if sys.argv[1] == "kept":
    assert configure_malloc({})
buffers = [bytearray(4 << 20) for _ in range(4)]
del buffers
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    buffers = [bytearray(4 << 20) for _ in range(4)]
    del buffers
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")
def test_buffers_that_are_freed_are_not_faulted_in_again() -> None:
    pages = {}
    for how in ("kept", "plain"):
        ended = subprocess.run(
            [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, env={}, cwd=ROOT
        )
        pages[how] = int(ended.stdout)
    assert pages["kept"] < pages["plain"] / 10  # 20 times 16 MiB are 80,000 pages


def test_what_the_environment_says_about_malloc_is_left_alone() -> None:
    assert not configure_malloc({"MALLOC_TRIM_THRESHOLD_": "1"})


PROGRAM = """
import os, sys
from services.runtime.process import set_omp_wait_policy
set_omp_wait_policy(os.environ, int(sys.argv[1]))
import torch
"""


@pytest.mark.skipif(sys.platform != "linux", reason="OMP_DISPLAY_ENV as libgomp prints it")
@pytest.mark.parametrize(
    ("given", "spins", "expected"),
    [
        ({}, 20_000, "GOMP_SPINCOUNT = '20000'"),
        pytest.param({}, 0, "OMP_WAIT_POLICY = 'PASSIVE'", marks=pytest.mark.slow),
        pytest.param({"OMP_WAIT_POLICY": "ACTIVE"}, 20_000, "OMP_WAIT_POLICY = 'ACTIVE'", marks=pytest.mark.slow),
    ],
)
def test_what_is_said_reaches_the_library_that_torch_loads(given: dict[str, str], spins: int, expected: str) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    environment = {**kept, "OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": os.getcwd(), **given}
    program = [sys.executable, "-c", PROGRAM, str(spins)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert expected in done.stderr


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_environment_says_is_kept(name: str) -> None:
    environ = {name: "1"}
    assert not set_omp_wait_policy(environ)
    assert environ == {name: "1"}
    other: dict[str, str] = {}
    assert set_omp_wait_policy(other)
    assert other == {"OMP_WAIT_POLICY": "PASSIVE"}
    spinning: dict[str, str] = {}
    assert set_omp_wait_policy(spinning, 500)
    assert spinning == {"GOMP_SPINCOUNT": "500", "KMP_BLOCKTIME": "1"}


@pytest.mark.parametrize("service", ["lm", "datastore"])
def test_nothing_with_threads_is_loaded_before_the_policy_is_set(service: str) -> None:
    """OpenMP reads it once, when torch or FAISS is loaded; `main` sets it."""
    program = f"import sys, services.{service}.app; print([m for m in ('torch', 'faiss', 'numba') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


COLLECTED = """
import asyncio, gc, os, signal, sys
from services.runtime.lifecycle import main
from tests.services.echo import EchoCore, EchoSettings, echo_service

class Core(EchoCore):
    def load(self):
        print("loading:", gc.isenabled())

    async def start(self):
        print("starting:", gc.isenabled())
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)

    async def close(self):
        objects = len(gc.get_objects())
        print("serving:", gc.isenabled(), gc.get_freeze_count() > 20 * objects, sys.getswitchinterval())

main(echo_service(Core(), EchoSettings(port=0, grpc_port=0)))
"""


def test_neither_garbage_collection_nor_another_thread_keeps_the_event_loop_waiting_for_long() -> None:
    """What has been loaded is not looked through, and threads take turns more often than Python lets them."""
    run = subprocess.run([sys.executable, "-c", COLLECTED], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.splitlines() == ["loading: False", "starting: True", "serving: True True 0.001"]


FAILING = """
import asyncio, os, signal
from services.runtime.lifecycle import main
from tests.services.echo import EchoCore, EchoSettings, echo_service

class Core(EchoCore):
    async def start(self):
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("the other service said no")

main(echo_service(Core(), EchoSettings(port=0, grpc_port=0)))
"""


def test_a_load_that_fails_while_the_service_is_told_to_end_is_logged() -> None:
    run = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 'event=load_failed reason="ValueError: the other service said no"' in run.stderr
