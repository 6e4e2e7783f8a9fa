"""The tuning curve as one small HTML page with nothing to fetch: perplexity and the best lambda against temperature."""

import html
import math
from collections.abc import Sequence
from pathlib import Path

from knnlm.evaluation.tuning import Fit, Point

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 64, 56, 16, 44
COLORS = ("#1f5fa8", "#b4541a", "#3a7d34", "#7a3e9d")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
text { font: 12px system-ui, sans-serif; fill: #444; } table { border-collapse: collapse; }
td, th { padding: .15rem .8rem .15rem 0; text-align: right; font-variant-numeric: tabular-nums; }
"""


def write_tuning_page(path: Path, fit: Fit, title: str) -> None:
    """Write `tuning_page` to `path`."""
    path.write_text(tuning_page(fit, title), encoding="utf-8")


def tuning_page(fit: Fit, title: str) -> str:
    """A whole HTML document. Solid: perplexity, logarithmic; dashed: lambda; one colour for each k."""
    tuning = fit.tuning
    by_k: dict[int, list[Point]] = {}
    for point in fit.curve:
        by_k.setdefault(point.k, []).append(point)
    name = html.escape(title)
    rows = "".join(
        f"<tr><td>{p.k}</td><td>{p.temperature:.5g}</td><td>{p.lmbda:.3f}</td><td>{p.perplexity:.4f}</td></tr>"
        for p in fit.curve
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>
<h1>{name}</h1>
<p>Best: temperature {tuning.temperature:.5g}, lambda {tuning.lmbda:.3f}, k {tuning.k}.
Perplexity {tuning.lm_perplexity:.4f} of the language model alone, {tuning.knn_perplexity:.4f} with neighbors,
on {tuning.tokens:,} tokens of {tuning.documents:,} documents.</p>
{_chart(by_k, tuning.lm_perplexity)}
<p>Solid: perplexity with the best lambda for each temperature. Dashed: that lambda. Dotted: the language model alone.
{" ".join(f'<b style="color:{_color(i)}">k = {k}</b>' for i, k in enumerate(by_k))}</p>
<details><summary>All points</summary><table>
<tr><th>k</th><th>temperature</th><th>lambda</th><th>perplexity</th></tr>{rows}</table></details>
</html>
"""


def _chart(by_k: dict[int, list[Point]], lm_perplexity: float) -> str:
    points = [p for row in by_k.values() for p in row]
    logs = [math.log(p.temperature) for p in points]
    heights = [math.log(p.perplexity) for p in points] + [math.log(lm_perplexity)]
    low, high = min(heights), max(heights)

    def x(temperature: float) -> float:
        return LEFT + _share(math.log(temperature), min(logs), max(logs)) * (WIDTH - LEFT - RIGHT)

    def y(share: float) -> float:
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def line(row: Sequence[tuple[float, float]], color: str, dash: str = "none") -> str:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in row)
        return f'<polyline fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}" points="{path}"/>'

    parts = []
    for i, row in enumerate(by_k.values()):
        parts.append(line([(x(p.temperature), y(_share(math.log(p.perplexity), low, high))) for p in row], _color(i)))
        parts.append(line([(x(p.temperature), y(p.lmbda)) for p in row], _color(i), "5 4"))
    level = y(_share(math.log(lm_perplexity), low, high))
    parts.append(line([(LEFT, level), (WIDTH - RIGHT, level)], "#888", "1 4"))
    for i in range(5):
        perplexity = math.exp(low + (high - low) * i / 4)
        parts.append(_label(LEFT - 6, y(i / 4) + 4, f"{perplexity:.4g}", "end"))
        parts.append(_label(WIDTH - RIGHT + 6, y(i / 4) + 4, f"{i / 4:g}", "start"))
        temperature = math.exp(min(logs) + (max(logs) - min(logs)) * i / 4)
        parts.append(_label(x(temperature), HEIGHT - BOTTOM + 18, f"{temperature:.3g}", "middle"))
    parts.append(_label(LEFT, HEIGHT - 6, "perplexity (left), lambda (right), against temperature", "start"))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="tuning curve">{"".join(parts)}</svg>'


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _share(value: float, low: float, high: float) -> float:
    """Where `value` lies between low and high, 0 to 1; in the middle when they are one."""
    return (value - low) / (high - low) if high > low else 0.5


def _color(i: int) -> str:
    return COLORS[i % len(COLORS)]
