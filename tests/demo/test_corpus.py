"""The text of the demo and of the pocket LM's training: complete, repeatable, and without copies across documents."""

from pathlib import Path

import pytest

from demo import corpus

SOURCE = '''"""The module speaks of itself, at some length."""
# A comment that stands alone,
# over two lines.
x = 1  # a remark beside code is no text


def f():
    """Too short."""


class A:
    """A class that has something to say to its readers.

    And more.
    """


add_newdoc("numpy", "arange", """
    arange([start,] stop)

    Evenly spaced values within a given interval.
    """)
'''


def test_docstrings_comments_and_added_docs_in_source_order(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(SOURCE)
    texts = list(corpus.texts_of(tmp_path / "m.py", comments=True))
    assert texts == [
        "The module speaks of itself, at some length.",
        "A comment that stands alone,\nover two lines.",
        "f\nToo short.",
        "A\nA class that has something to say to its readers.\n\nAnd more.",
        "arange([start,] stop)\n\nEvenly spaced values within a given interval.",
    ]
    assert "A comment" not in "".join(corpus.texts_of(tmp_path / "m.py", comments=False))
    (tmp_path / "broken.py").write_text("def f(:")
    assert list(corpus.texts_of(tmp_path / "broken.py", comments=True)) == []


@pytest.mark.parametrize(
    "domain", [pytest.param(d, marks=[pytest.mark.slow] if d == "torch" else []) for d in corpus.DOMAINS]
)
def test_a_domain_is_repeatable_text_without_copies(domain: str) -> None:
    rows = list(corpus.documents(domain))
    assert rows == list(corpus.documents(domain))
    assert len({row["id"] for row in rows}) == len(rows) > 20
    assert sum(len(row["text"]) for row in rows) > 300_000
    paragraphs = [p for row in rows for p in {p for p in row["text"].split("\n\n") if len(p) > 400}]
    assert len(set(paragraphs)) > 0.98 * len(paragraphs)


def test_no_domain_is_in_the_training_text() -> None:
    assert not set(corpus.GENERAL) & set(corpus.DOMAINS)
