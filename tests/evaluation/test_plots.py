"""The tuning page: a whole document that needs nothing else."""

import re
from pathlib import Path
from xml.etree import ElementTree

from knnlm.evaluation.plots import tuning_page, write_tuning_page
from knnlm.evaluation.tuning import Fit, Point
from knnlm.tuning_records import Tuning


def a_fit(curve: tuple[Point, ...]) -> Fit:
    best = min(curve, key=lambda point: point.perplexity)
    return Fit(Tuning(best.temperature, best.lmbda, best.k, 30.0, best.perplexity, 1000, 10), curve)


CURVE = (Point(8, 1.0, 0.1, 25.0), Point(8, 10.0, 0.3, 20.0), Point(8, 100.0, 0.2, 22.0), Point(64, 10.0, 0.4, 19.0))


def test_page_draws_every_point_and_names_the_best() -> None:
    page = tuning_page(a_fit(CURVE), "law v1")
    chart = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])  # noqa: S314  our own text
    lines = [line.attrib["points"].split() for line in chart.iter("polyline")]
    assert [len(line) for line in lines] == [3, 3, 1, 1, 2]  # perplexity and lambda for each k, then the LM
    assert "temperature 10, lambda 0.400, k 64" in page
    assert page.count("<tr><td>") == len(CURVE)


def test_lower_perplexity_is_drawn_lower() -> None:
    page = tuning_page(a_fit(CURVE), "law v1")
    first = re.findall(r'points="([^"]+)"', page)[0].split()
    heights = [float(point.split(",")[1]) for point in first]
    assert heights[1] == max(heights)  # y grows downwards in SVG


def test_page_fetches_nothing_and_escapes_its_title() -> None:
    page = tuning_page(a_fit(CURVE), "<script>x</script>")
    assert "<script" not in page
    assert not re.search(r"(src|href)=|https?://|@import", page)


def test_flat_curve_can_be_drawn(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_tuning_page(path, a_fit((Point(1, 5.0, 0.0, 30.0),)), "flat")
    assert "nan" not in path.read_text(encoding="utf-8")
