import platform
import subprocess
import sys
from pathlib import Path

import pytest

from services.runtime.allocation import keep_buffers

ROOT = Path(__file__).parents[3]
FAULTS = """
import resource, sys
from services.runtime.allocation import keep_buffers
if sys.argv[1] == "kept":
    assert keep_buffers({})
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
    assert not keep_buffers({"MALLOC_TRIM_THRESHOLD_": "1"})
