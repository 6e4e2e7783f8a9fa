"""What an experiment gives, kept as JSON: tables, curves and verdicts, and all it takes to repeat them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.verdicts import Outcome, Verdict
from knnlm.datastore.files import write_atomic

__all__ = ["Cell", "Chart", "Findings", "Line", "NotARecord", "Record", "Table", "load", "load_all", "save"]

Cell = str | float | int | None


@dataclass(frozen=True)
class Table:
    """rows: of cells as wide as columns; numbers are shown with four significant digits, None is empty."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: {len(row)} cells for {len(self.columns)} columns")


@dataclass(frozen=True)
class Line:
    """A curve, drawn through its points. low, high: of a band around it, empty without one."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class Chart:
    """A figure with the axes of the paper's. log_x: a logarithmic axis. bars: draw points as bars, by their name."""

    name: str
    title: str
    x: str
    y: str
    lines: tuple[Line, ...]
    log_x: bool = False
    bars: bool = False


@dataclass(frozen=True)
class Findings:
    """What one experiment found. notes: sentences on how it differs from the paper's, and what to make of it."""

    tables: tuple[Table, ...]
    verdicts: tuple[Verdict, ...]
    charts: tuple[Chart, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """Findings, and where they come from. texts: name to sha256. seconds: of this experiment, without what others had
    prepared; prepared_seconds: of making what it needs, whoever made it. peak_bytes: memory of the process."""

    name: str
    paper: str
    title: str
    scale: str
    findings: Findings
    commit: str
    machine: str
    command: str
    model: str
    model_sha256: str
    source: str
    texts: Mapping[str, str]
    seed: int
    seconds: float
    prepared_seconds: float
    peak_bytes: int
    extra: Mapping[str, Any] = field(default_factory=dict)  # Any: JSON


class NotARecord(Exception):
    """A file that is damaged, or was written by another version of this program."""


def save(record: Record, folder: Path) -> Path:
    """Write it to `folder`, replacing a former one at once."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.name}.json"
    text = json.dumps(_rounded(asdict(record)), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(path, text.encode())
    return path


def load(path: Path) -> Record:
    """Raises NotARecord, naming the file."""
    try:
        return _record(json.loads(path.read_text(encoding="utf-8")))
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        problem = f"{type(err).__name__}: {err}"
        raise NotARecord(f"{path} is no record ({problem}): remove it, or run {path.stem} again") from err


def _record(raw: dict[str, Any]) -> Record:  # Any: JSON
    found = raw.pop("findings")
    findings = Findings(
        tuple(Table(t["title"], tuple(t["columns"]), tuple(map(tuple, t["rows"]))) for t in found["tables"]),
        tuple(Verdict(**{**v, "outcome": Outcome(v["outcome"])}) for v in found["verdicts"]),
        tuple(Chart(**{**c, "lines": tuple(_line(line) for line in c["lines"])}) for c in found["charts"]),
        tuple(found["notes"]),
    )
    return Record(findings=findings, **raw)


def load_all(folder: Path, names: Sequence[str]) -> list[Record]:
    """The records of `names` that are there, in this order."""
    return [load(folder / f"{name}.json") for name in names if (folder / f"{name}.json").is_file()]


def _line(raw: Mapping[str, Any]) -> Line:  # Any: JSON
    return Line(raw["name"], *(tuple(raw[part]) for part in ("x", "y", "low", "high")))


def _rounded(value: Any) -> Any:  # Any: JSON
    """Numbers to seven significant digits: more is noise, and files stay small."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value
