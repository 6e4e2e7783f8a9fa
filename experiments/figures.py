"""Charts of records as SVG and PNG, the same bytes for the same record and the same matplotlib."""

from pathlib import Path
from typing import Any

from experiments.records import Chart

__all__ = ["draw"]

SIZE = (6.4, 4.0)
STYLE = {"font.size": 9, "svg.hashsalt": "knnlm", "axes.grid": True, "grid.alpha": 0.3, "figure.autolayout": True}


def draw(chart: Chart, stem: Path) -> list[Path]:
    """Write `stem`.svg and `stem`.png; returns both."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        figure, axes = plt.subplots(figsize=SIZE)
        (_bars if chart.bars else _lines)(axes, chart)
        axes.set(xlabel=chart.x, ylabel=chart.y, title=chart.title)
        if len(chart.lines) > 1:
            axes.legend()
        files = [stem.with_name(f"{stem.name}.svg"), stem.with_name(f"{stem.name}.png")]
        figure.savefig(files[0], metadata={"Date": None, "Creator": None})
        figure.savefig(files[1], dpi=120, metadata={"Software": None})
        plt.close(figure)
    return files


def _lines(axes: Any, chart: Chart) -> None:  # Any: of matplotlib
    for line in chart.lines:
        (drawn,) = axes.plot(line.x, line.y, marker="o", markersize=3, label=line.name)
        if line.low:
            axes.fill_between(line.x, line.low, line.high, color=drawn.get_color(), alpha=0.15)
    if chart.log_x:
        axes.set_xscale("log", base=2)


def _bars(axes: Any, chart: Chart) -> None:  # Any: of matplotlib
    width = 0.8 / max(1, len(chart.lines))
    for number, line in enumerate(chart.lines):
        places = [x + (number - (len(chart.lines) - 1) / 2) * width for x in line.x]
        errors = None
        if line.low:
            below = [y - low for y, low in zip(line.y, line.low, strict=True)]
            errors = [below, [high - y for y, high in zip(line.y, line.high, strict=True)]]
        axes.bar(places, line.y, width, yerr=errors, label=line.name, capsize=2)
