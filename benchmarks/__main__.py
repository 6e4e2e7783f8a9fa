"""Run every benchmark, one after another, each in a process of its own, and end with the JSON line of each figure.

    python -m benchmarks [NAME ...] [options of the programs, such as --size N]

The lines are also written to build/bench/results.jsonl; `python -m benchmarks.results` makes a table of them. A goal
that is not reached is reported, not an error; ends with status 1 when a program fails.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

from benchmarks.harness import ROOT

RESULTS = ROOT / "build" / "bench" / "results.jsonl"
NO_BENCHMARKS = {"__main__", "results"}


def programs() -> list[str]:
    """The modules here that can be run, those of a cluster where Ray is installed; the others are what they share."""
    texts = {f.stem: f.read_text("utf-8") for f in Path(__file__).parent.glob("*.py")}
    runnable = [name for name, text in texts.items() if '__name__ == "__main__"' in text]
    without = set() if find_spec("ray") else {name for name in runnable if "knnlm[cluster]" in texts[name]}
    return sorted(set(runnable) - NO_BENCHMARKS - without)


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(given):
        print(f"{(__doc__ or '').strip()}\n\nNAME: {', '.join(programs())}; all by default")
        return 0
    names = list(takewhile(lambda word: not word.startswith("-"), given))  # what follows belongs to the programs
    unknown = sorted(set(names) - set(programs()))
    if unknown:
        raise SystemExit(f"no benchmark {unknown[0]!r}: there are {', '.join(programs())}")
    calls = {name: [sys.executable, "-m", f"benchmarks.{name}"] for name in names or programs()}
    lines, failed = run_all(calls, given[len(names) :])
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    missed = [line for line in lines if json.loads(line)["holds"] is False]
    print(
        f"\n{len(lines)} figures, {len(missed)} goals not reached"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    print("\n".join(lines), flush=True)
    return 1 if failed else 0


def run_all(calls: dict[str, list[str]], options: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the JSON lines of all figures, the names of the programs that failed or gave none), showing what they say."""
    lines: list[str] = []
    failed = []
    for name, call in calls.items():
        print(f"\n== {name}: {' '.join(['python', *call[1:], *options])}", flush=True)
        found = []
        with subprocess.Popen([*call, *options], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                if is_figure(line):
                    found.append(line.strip())
        if process.returncode or not found:
            print(f"{name} failed: status {process.returncode}, {len(found)} figures", flush=True)
            failed.append(name)
        lines += found
    return lines, failed


def is_figure(line: str) -> bool:
    """Whether a line of output is what `harness.figure` prints."""
    if not line.startswith("{"):
        return False
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and {"figure", "value", "goal", "holds"} <= row.keys()


if __name__ == "__main__":
    sys.exit(main())
