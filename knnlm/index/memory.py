"""How much memory this process may still take, and the refusal of what does not fit, before anything is loaded.

A process that takes more than there is gets killed by the system, and with it every domain it serves. So the need of a
version, known from its files, is compared with what the machine and the container's limit leave.
"""

import ctypes
import os
import sys
from pathlib import Path

from knnlm.errors import InsufficientMemory

__all__ = ["available_bytes", "readable", "release_freed", "require"]

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def available_bytes(*, proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Bytes that can be taken without swapping: the least of what the machine has and what control groups allow.

    The page cache counts as available where the system may drop it, mapped files included. Linux: MemAvailable, and
    for each control group of this process, version 1 or 2, its limit less its usage. Elsewhere free memory or, where
    only that is known (macOS), all the machine has: then what is refused can never fit. None when nothing is known.
    """
    found = [_machine(proc / "meminfo"), *_groups(proc / "self" / "cgroup", cgroups)]
    known = [room for room in found if room is not None]
    return max(0, min(known)) if known else _from_sysconf()


def require(needed: int, path: Path, *, limit: int | None = None, proc: Path = PROC, cgroups: Path = CGROUPS) -> None:
    """Refuse to load the version at `path`, which would hold `needed` bytes in memory, when there is no room for them.

    limit: what is left of an allowance (a setting), in bytes. Raises InsufficientMemory with both numbers.
    """
    if limit is not None and needed > limit:
        raise _refusal(needed, path, f"{readable(max(limit, 0))} are left of what this process is allowed")
    available = available_bytes(proc=proc, cgroups=cgroups)
    if available is not None and needed > available:
        raise _refusal(needed, path, f"{readable(available)} are available")


def readable(size: int) -> str:
    """ "1.5 GiB (1610612736 bytes)"."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1 << 10 * power:
            return f"{size / (1 << 10 * power):.1f} {unit} ({size} bytes)"
    return f"{size} bytes"


def release_freed() -> bool:
    """Give memory that was freed back to the system; glibc keeps much of it otherwise. True when some was given back.

    Takes up to a second when tens of gigabytes were freed; other threads run meanwhile. Elsewhere than on glibc
    nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    return trim is not None and bool(trim(0))


def _refusal(needed: int, path: Path, room: str) -> InsufficientMemory:
    return InsufficientMemory(
        f"{path} would hold {readable(needed)} in memory, {room}: build a smaller index, map it instead of reading it "
        "(memory mapped), or serve it from a replica on a machine with more memory"
    )


def _machine(meminfo: Path) -> int | None:
    lines = dict(line.split(":", 1) for line in _text(meminfo).splitlines() if ":" in line)
    words = lines.get("MemAvailable", "").split()
    return 1024 * int(words[0]) if words else None


def _groups(membership: Path, cgroups: Path) -> list[int | None]:
    """What is left in every control group that holds this process; a group's limit binds those inside it."""
    rooms: list[int | None] = []
    mounts: tuple[Path, ...]
    for line in _text(membership).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            mounts, room = (cgroups, cgroups / "unified"), _room_v2
        elif "memory" in controllers.split(","):
            mounts, room = (cgroups / "memory",), _room_v1
        else:
            continue
        # inside a container the path may be that of the host, which is not there: its own group is the mount itself
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in mounts:
            rooms += [room(mount.joinpath(*parts[:depth])) for depth in range(len(parts) + 1)]
    return rooms


def _room_v2(group: Path) -> int | None:
    limits = [limit for name in ("memory.max", "memory.high") if (limit := _number(group / name)) is not None]
    used = _number(group / "memory.current")
    return min(limits) - used + _droppable(group, "") if limits and used is not None else None


def _room_v1(group: Path) -> int | None:
    limit, used = _number(group / "memory.limit_in_bytes"), _number(group / "memory.usage_in_bytes")
    return limit - used + _droppable(group, "total_") if limit is not None and used is not None else None


def _droppable(group: Path, prefix: str) -> int:
    """Page cache: files alone, not what lies in memory only (tmpfs)."""
    counted = dict(line.split() for line in _text(group / "memory.stat").splitlines())
    return sum(int(counted.get(prefix + name, 0)) for name in ("active_file", "inactive_file"))


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdigit() else None  # "max": no limit


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except OSError:  # not Linux, not this version of control groups, or not for us to read
        return ""


def _from_sysconf() -> int | None:
    names = getattr(os, "sysconf_names", {})
    for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        if name in names:
            pages, size = os.sysconf(name), os.sysconf("SC_PAGE_SIZE")
            if pages > 0 and size > 0:
                return pages * size
    return None
