"""The JSON lines of benchmarks as a Markdown table, for the page that records them.

python -m benchmarks.results [FILE ...]      by default what `python -m benchmarks` wrote last
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.__main__ import RESULTS, is_figure

COLUMNS = ("figure", "value", "goal", "holds", "size", "command", "commit")


def main(arguments: Sequence[str]) -> None:
    files = [Path(name) for name in arguments] or [RESULTS]
    for file in files:
        if not file.is_file():
            raise SystemExit(f"{file}: no such file; `python -m benchmarks` writes {RESULTS}")
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if is_figure(line)]
    print(markdown(json.loads(line) for line in lines), end="")


def markdown(rows: Iterable[dict[str, Any]]) -> str:  # Any: JSON
    """A table, and below it the machines. The last of several lines of one figure at one size counts."""
    last = {(row["figure"], row.get("size")): row for row in rows}
    text = "| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS) + "\n"
    for row in last.values():
        text += "| " + " | ".join(_cell(row, column) for column in COLUMNS) + " |\n"
    machines = sorted({row["machine"] for row in last.values() if row.get("machine")})
    return text + "".join(f"\nMachine: {name}\n" for name in machines)


def _cell(row: dict[str, Any], column: str) -> str:  # Any: JSON
    value = row.get(column)
    if value is None:
        return "-"
    if column == "goal":
        return f"{'≤' if row.get('better') == 'less' else '≥'} {value:g}"
    if column == "holds":
        return "yes" if value else "**no**"
    if column == "value":
        return f"{value:.4g}"
    if column == "size":
        return f"{value:,}"
    return f"`{value}`" if column in ("command", "commit") else str(value).replace("|", "\\|")


if __name__ == "__main__":
    main(sys.argv[1:])
