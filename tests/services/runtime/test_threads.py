"""Threads that wait without spinning, as OpenMP itself reports it."""

import os
import subprocess
import sys

import pytest

from services.runtime.threads import wait_passively

PROGRAM = """
import os
from services.runtime.threads import wait_passively
wait_passively(os.environ)
import torch
"""


@pytest.mark.skipif(sys.platform != "linux", reason="OMP_DISPLAY_ENV as libgomp prints it")
@pytest.mark.parametrize(("given", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_what_is_said_reaches_the_library_that_torch_loads(given: dict[str, str], expected: str) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    environment = {**kept, "OMP_DISPLAY_ENV": "TRUE", "PYTHONPATH": os.getcwd(), **given}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert f"OMP_WAIT_POLICY = '{expected}'" in done.stderr


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_environment_says_is_kept(name: str) -> None:
    environ = {name: "1"}
    assert not wait_passively(environ)
    assert environ == {name: "1"}
    other: dict[str, str] = {}
    assert wait_passively(other)
    assert other == {"OMP_WAIT_POLICY": "PASSIVE"}
