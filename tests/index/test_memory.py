"""What counts as available, and what is refused; the system's files are made up."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TypedDict

import pytest

from knnlm.errors import InsufficientMemory
from knnlm.index.memory import available_bytes, readable, require

GIB = 1 << 30


class Places(TypedDict):
    proc: Path
    cgroups: Path


def machine(root: Path, *, available: int, cgroup: str = "") -> Places:
    """/proc of a machine with so many bytes; returns the paths that the functions take."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(
        f"MemTotal:       {available // 1024 * 2} kB\nMemFree:        12 kB\nMemAvailable:   {available // 1024} kB\n"
    )
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    return {"proc": root / "proc", "cgroups": root / "cgroup"}


def group(folder: Path, **numbers: int | str) -> None:
    """Files of a control group: memory_max=1 becomes memory.max; memory_stat is text."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in numbers.items():
        (folder / name.replace("memory_", "memory.", 1)).write_text(f"{value}\n")


def test_without_limits_it_is_what_the_machine_can_give(tmp_path: Path) -> None:
    assert available_bytes(**machine(tmp_path, available=8 * GIB)) == 8 * GIB


def test_a_limit_of_version_2_less_its_usage_where_file_cache_is_no_usage(tmp_path: Path) -> None:
    paths = machine(tmp_path, available=8 * GIB, cgroup="0::/kubepods/pod1\n")
    group(
        tmp_path / "cgroup" / "kubepods" / "pod1",
        memory_max=4 * GIB,
        memory_current=3 * GIB,
        memory_stat=f"anon {GIB}\nfile {2 * GIB}\nshmem {GIB}\ninactive_file {GIB // 2}\nactive_file {GIB // 4}",
    )
    assert available_bytes(**paths) == GIB + GIB // 2 + GIB // 4


def test_the_tightest_group_from_the_process_up_to_the_root_counts(tmp_path: Path) -> None:
    paths = machine(tmp_path, available=8 * GIB, cgroup="0::/slice/service\n")
    group(tmp_path / "cgroup" / "slice" / "service", memory_max="max", memory_current=GIB)
    group(tmp_path / "cgroup" / "slice", memory_max=3 * GIB, memory_current=GIB)
    assert available_bytes(**paths) == 2 * GIB
    group(tmp_path / "cgroup" / "slice" / "service", memory_high=GIB + 5)
    assert available_bytes(**paths) == 5


def test_a_limit_of_version_1_in_a_hybrid_tree(tmp_path: Path) -> None:
    paths = machine(tmp_path, available=8 * GIB, cgroup="5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n")
    group(
        tmp_path / "cgroup" / "memory" / "a",
        memory_limit_in_bytes=2 * GIB,
        memory_usage_in_bytes=GIB,
        memory_stat=f"cache {GIB}\ninactive_file 1\ntotal_inactive_file 300\ntotal_active_file 20",
    )
    group(tmp_path / "cgroup" / "cpu,cpuacct" / "a", memory_limit_in_bytes=1, memory_usage_in_bytes=0)
    assert available_bytes(**paths) == GIB + 320
    group(tmp_path / "cgroup" / "memory", memory_limit_in_bytes=(1 << 63) - 4096, memory_usage_in_bytes=5 * GIB)
    assert available_bytes(**paths) == GIB + 320  # no limit is a huge one


def test_version_2_beside_version_1_is_mounted_under_its_own_name(tmp_path: Path) -> None:
    paths = machine(tmp_path, available=8 * GIB, cgroup="4:cpu:/a\n0::/a\n")
    group(tmp_path / "cgroup" / "unified" / "a", memory_max=GIB, memory_current=0)
    assert available_bytes(**paths) == GIB


@pytest.mark.parametrize("path", ["/docker/0123", "/../../system.slice/x", "/"])
def test_in_a_container_the_mount_is_its_own_group(tmp_path: Path, path: str) -> None:
    paths = machine(tmp_path, available=8 * GIB, cgroup=f"0::{path}\n")
    group(tmp_path / "cgroup", memory_max=2 * GIB, memory_current=GIB)
    group(tmp_path, memory_max=7, memory_current=0)  # what ".." of the path would lead to is no control group
    assert available_bytes(**paths) == GIB


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    paths = machine(tmp_path, available=8 * GIB, cgroup="0::/\n")
    group(tmp_path / "cgroup", memory_max=GIB, memory_current=2 * GIB)
    assert available_bytes(**paths) == 0


def test_without_the_files_of_linux_the_system_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    monkeypatch.setattr(os, "sysconf", {known: 1000, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert available_bytes(proc=tmp_path / "no", cgroups=tmp_path / "no") == 1000 * 4096


def test_what_fits_passes_and_one_byte_more_is_refused_with_both_numbers(tmp_path: Path) -> None:
    paths = machine(tmp_path, available=GIB)
    require(GIB, Path("law/v3"), **paths)
    with pytest.raises(InsufficientMemory) as caught:
        require(GIB + 1, Path("law/v3"), **paths)
    message = caught.value.message
    assert "law/v3" in message
    assert "1.0 GiB (1073741825 bytes)" in message
    assert "1.0 GiB (1073741824 bytes) are available" in message
    for way_out in ("smaller index", "mapped", "replica"):
        assert way_out in message


def test_an_allowance_binds_before_the_machine_does(tmp_path: Path) -> None:
    paths = machine(tmp_path, available=GIB)
    require(1000, Path("v"), limit=1000, **paths)
    with pytest.raises(InsufficientMemory, match=r"1\.0 KiB \(1025 bytes\).* 1000 bytes are left of what this"):
        require(1025, Path("v"), limit=1000, **paths)
    with pytest.raises(InsufficientMemory, match=r" 0 bytes are left"):
        require(1, Path("v"), limit=-5, **paths)
    with pytest.raises(InsufficientMemory, match="are available"):
        require(2 * GIB, Path("v"), limit=3 * GIB, **paths)


def test_nothing_needed_is_never_refused(tmp_path: Path) -> None:
    require(0, Path("v"), **machine(tmp_path, available=0))
    require(0, Path("v"))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB (1536 bytes)"),
        (5 << 20, "5.0 MiB (5242880 bytes)"),
        (3 << 40, "3.0 TiB (3298534883328 bytes)"),
    ],
)
def test_sizes_are_given_in_a_readable_unit_and_in_bytes(size: int, text: str) -> None:
    assert readable(size) == text


HELD = """
import ctypes, os
from pathlib import Path
from knnlm.index.memory import release_freed

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
blocks = []
for _ in range(2000):  # of a size that comes from the heap
    blocks.append(malloc(64 << 10))
    ctypes.memset(blocks[-1], 1, 64 << 10)
pin = malloc(100 << 10)  # larger than any hole: on top, it keeps the heap from shrinking by itself
for block in blocks:
    free(block)
kept = resident()
print(release_freed(), kept - resident())
"""


@pytest.mark.skipif(
    not hasattr(__import__("ctypes").CDLL(None), "malloc_trim"), reason="glibc alone keeps what is freed"
)
def test_freed_memory_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    released, given_back = done.stdout.split()
    assert released == "True"
    assert int(given_back) > 100 << 20  # of 125 MiB
