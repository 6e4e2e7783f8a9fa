"""What every benchmark shares: its options, the only way to time, and the JSON line that it ends with.

A machine is never as quiet at one moment as at another, so nothing is timed alone: what is compared runs in turn, many
times, and a ratio is taken within each round. Knows nothing of what is measured.
"""

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from knnlm.evaluation.timing import Rate, interleave

__all__ = [
    "ROOT", "SMALL", "Latency", "Rate", "arguments", "command", "commit", "figure", "interleave", "latencies",
    "machine", "table",
]  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent
SMALL = 100_000  # entries: minutes for everything, from nothing


@dataclass(frozen=True)
class Latency:
    """Seconds of single calls, in the order they were made."""

    seconds: tuple[float, ...]

    @property
    def p50(self) -> float:
        return float(np.quantile(self.seconds, 0.5))

    @property
    def p99(self) -> float:
        return float(np.quantile(self.seconds, 0.99))


def arguments(doc: str) -> argparse.ArgumentParser:
    """The options that every program has; it may add its own. `doc`: its docstring, shown by --help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=_positive, default=SMALL, help=f"entries of the datastore (default {SMALL})")
    parser.add_argument(
        "--text", type=Path, nargs="+", action="extend", default=[], metavar="PATH",
        help=".txt, .md, .rst, .jsonl or .parquet files, or folders of them (default: docstrings of packages)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default 0)")
    return parser


def latencies(programs: Mapping[str, Callable[[], object]], calls: int = 200) -> dict[str, Latency]:
    """Call the programs in turn, one call of each at a time, `calls` times; each five times before, untimed."""
    if calls < 1 or not programs:
        raise ValueError(f"expected programs and calls >= 1, got {len(programs)} and {calls}")
    for program in programs.values():
        for _ in range(5):
            program()
    found: dict[str, list[float]] = {name: [] for name in programs}
    for call in range(calls):
        for name in list(programs)[:: -1 if call % 2 else 1]:
            begun = time.perf_counter()
            programs[name]()
            found[name].append(time.perf_counter() - begun)
    return {name: Latency(tuple(seconds)) for name, seconds in found.items()}


def figure(
    name: str, value: float, goal: float | None, *, better: str = "more", **extra: Any
) -> dict[str, Any]:  # Any: JSON
    """Print and return the line of one figure. better: "more" is better than the goal, or "less".

    holds: whether the goal is reached, which a value that is no number never is; null when there is no goal. `extra`
    goes in as it is. Where, how and from which commit the figure comes is added.
    """
    if better not in ("more", "less"):
        raise ValueError(f"better must be more or less, got {better!r}")
    holds = None
    if goal is not None:
        holds = bool(value >= goal if better == "more" else value <= goal)
    line = {
        "figure": name,
        "value": float(f"{value:.5g}") if math.isfinite(value) else None,
        "goal": goal,
        "holds": holds,
        "better": better,
        **extra,
        "command": command(),
        "machine": machine(),
        "commit": commit(),
    }
    print(json.dumps(line, ensure_ascii=False, allow_nan=False), flush=True)
    return line


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """For people: the first column to the left, the others, numbers mostly, to the right."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), flush=True)


def command() -> str:
    """What was typed, such that it can be typed again in the repository's root."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    started = ["-m", spec.name.removesuffix(".__main__")] if spec is not None else [Path(sys.argv[0]).name]
    return shlex.join(["python", *started, *sys.argv[1:]])


def commit() -> str:
    """The commit of the repository, with "+" where files are changed; "unknown" where there is no repository."""
    try:
        name = _git("rev-parse", "--short=10", "HEAD")
        return name + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> str:
    """Processor, cores this process may use, memory, GPU and the settings of OpenMP, on one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    set_here = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY") if name in os.environ]
    return ", ".join([_processor(), f"{cores} cores", f"{memory / 2**30:.0f} GiB", _gpu(), *set_here])


def _processor() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _gpu() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return "no GPU"
    return " and ".join(name.strip() for name in names if name.strip()) or "no GPU"


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def _git(*arguments: str) -> str:
    call = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number
