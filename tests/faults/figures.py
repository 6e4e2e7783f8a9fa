"""What a fault test measured: how long it may run, what a process holds, and one line of JSON for the documentation."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Held", "held", "percentile", "report", "span"]


@dataclass(frozen=True)
class Held:
    """Of one process, as /proc says. resident: bytes, those of mapped files left out, which the system may drop."""

    resident: int
    descriptors: int
    threads: int
    maps: int

    def figures(self) -> dict[str, float]:
        return {**asdict(self), "resident": round(self.resident / 2**20, 1)}


def held(pid: int | str = "self") -> Held:
    folder = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return Held(
        resident=1024 * int(status["RssAnon"].split()[0]),
        descriptors=len(os.listdir(folder / "fd")),
        threads=int(status["Threads"]),
        maps=len((folder / "maps").read_text().splitlines()),
    )


def span(default: float) -> float:
    """Seconds that the long part of a test takes: KNNLM_FAULTS_SECONDS, where somebody wants it shorter or longer."""
    return float(os.environ.get("KNNLM_FAULTS_SECONDS", default))


def percentile(seconds: Sequence[float], share: float) -> float:
    """What `share` of these took at most; nan of none."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def report(test: str, **figures: Any) -> None:
    """Any JSON, on a line of its own: pytest -s shows it."""
    print("\n" + json.dumps({"faults": test, "cores": os.cpu_count(), **figures}), flush=True)
