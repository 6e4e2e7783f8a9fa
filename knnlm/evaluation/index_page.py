"""An index report as one small HTML page with nothing to fetch: speed against perplexity, then all its numbers."""

import html
import math
from pathlib import Path

from knnlm.evaluation.index_report import IndexReport, Line
from knnlm.evaluation.plots import STYLE

__all__ = ["index_page", "plotted_cell", "write_index_page"]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 480, 64, 24, 16, 48
COLOR, EXACT_COLOR = "#1f5fa8", "#888"
PLOTTED_BATCH, PLOTTED_K = 64, 1024
LINE_HEIGHT, LETTER = 13, 6.8  # of a label, about

Box = tuple[float, float, float, float]  # left, top, right, bottom


def write_index_page(path: Path, report: IndexReport) -> None:
    """Write `index_page` to `path`."""
    path.write_text(index_page(report), encoding="utf-8")


def index_page(report: IndexReport) -> str:
    """A whole HTML document. Filled: rescored; hollow: not rescored; dotted: the perplexity of exact search."""
    batch, k = plotted_cell(report)
    name = html.escape(f"{report.domain} {report.version}: {report.entries:,} entries")
    cells = [(b, k) for k in report.ks for b in report.batches]
    heads = ["index", "bytes/key", "stored bytes/key", "build s", *(f"recall@{k}" for k in report.ks)]
    heads += ["total variation", "perplexity", *(f"q/s {b}, {k}" for b, k in cells)]
    rows = "".join(
        f"<tr>{''.join(f'<td>{cell}</td>' for cell in _row(line, report, cells))}</tr>" for line in report.lines
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}
body {{ max-width: 56rem; }} .wide {{ overflow-x: auto; }} td:first-child {{ text-align: left; white-space: nowrap; }}
</style>
<h1>{name}</h1>
<p>Queries per second at batch {batch}, k = {k}, against perplexity at fitted temperature and lambda, on
{report.queries:,} tokens of {report.documents:,} documents; both axes are logarithmic. Right and low is better.</p>
{_chart(report, batch, k)}
<p>Filled: distances rescored; hollow: not rescored. Dotted: exact search,
{report.exact.perplexity:.4f}. The language model alone: {report.lm_perplexity:.4f}.</p>
<div class="wide"><table><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr>{rows}</table></div>
</html>
"""


def plotted_cell(report: IndexReport) -> tuple[int, int]:
    """The (batch, k) that is drawn: PLOTTED_BATCH and PLOTTED_K, or what comes nearest."""
    batch = min(report.batches, key=lambda b: abs(math.log(b / PLOTTED_BATCH)))
    return batch, min(report.ks, key=lambda k: abs(math.log(k / PLOTTED_K)))


def _row(line: Line, report: IndexReport, cells: list[tuple[int, int]]) -> list[str]:
    quality = line.quality
    return [
        html.escape(line.name),
        f"{line.bytes_per_key:.1f}",
        str(line.stored_bytes_per_key),
        f"{line.build_seconds:.1f}",
        *(f"{quality.recalls[k]:.4f}" for k in report.ks),
        f"{quality.total_variation:.4f}",
        f"{quality.perplexity:.4f}",
        *(f"{line.speeds[cell]:,.0f}" for cell in cells),
    ]


def _chart(report: IndexReport, batch: int, k: int) -> str:
    speeds = [math.log(line.speeds[batch, k]) for line in report.lines]
    losses = [math.log(line.quality.perplexity) for line in report.lines]
    exact = math.log(report.exact.perplexity)
    left, right, low, high = min(speeds), max(speeds), min([*losses, exact]), max([*losses, exact])

    def x(speed: float) -> float:
        return LEFT + 12 + _share(speed, left, right) * (WIDTH - LEFT - RIGHT - 24)

    def y(loss: float) -> float:
        return HEIGHT - BOTTOM - 8 - _share(loss, low, high) * (HEIGHT - TOP - BOTTOM - 16)

    parts = []
    for i in range(5):
        speed, loss = left + (right - left) * i / 4, low + (high - low) * i / 4
        parts.append(_text(x(speed), HEIGHT - BOTTOM + 18, f"{math.exp(speed):,.0f}", "middle"))
        parts.append(_text(LEFT - 6, y(loss) + 4, f"{math.exp(loss):.5g}", "end"))
    parts.append(_text(LEFT, HEIGHT - 6, f"perplexity, against queries/s at batch {batch}, k = {k}", "start"))
    parts.append(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(exact):.1f}" y2="{y(exact):.1f}" '
        f'stroke="{EXACT_COLOR}" stroke-dasharray="1 4"/>'
    )
    at = [(x(speed), y(loss)) for speed, loss in zip(speeds, losses, strict=True)]
    boxes: list[Box] = [(a - 5, b - 5, a + 5, b + 5) for a, b in at]
    for line, (a, b) in sorted(zip(report.lines, at, strict=True), key=lambda pair: pair[1][1]):
        fill = COLOR if line.rescored else "none"
        parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{fill}" stroke="{COLOR}"/>')
        parts.append(_placed(line.candidate.name, a, b, boxes))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="speed and perplexity">{"".join(parts)}</svg>'


def _placed(name: str, a: float, b: float, boxes: list[Box]) -> str:
    """The label of the point (a, b), where it covers nothing, or least far below; its box is added to `boxes`."""
    width = LETTER * len(name)
    start = a + 8 if a + 8 + width < WIDTH else a - 8 - width
    places = [b + 4 + LINE_HEIGHT * step * side for step in range(12) for side in (1, -1)]
    places = [p for p in places if TOP + LINE_HEIGHT < p < HEIGHT - BOTTOM] or [b + 4]
    for base in places:
        box = (start, base - LINE_HEIGHT + 3, start + width, base + 2)
        if not any(_overlap(box, other) for other in boxes):
            break
    else:
        box = (start, places[0] - LINE_HEIGHT + 3, start + width, places[0] + 2)
    boxes.append(box)
    return _text(start, box[3] - 2, name, "start")


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _share(value: float, low: float, high: float) -> float:
    """Where `value` lies between low and high, 0 to 1; in the middle when they are one."""
    return (value - low) / (high - low) if high > low else 0.5
