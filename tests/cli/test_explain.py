"""`knnlm explain`: here and of a running system, as text, JSON and a page that hostile texts cannot break."""

import asyncio
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from knnlm.attribution import DocumentShare
from knnlm.cli.explain import printable, shaded
from knnlm.cli.explained_page import explained_page
from knnlm.clients.explained import Explained, ExplainedComponent, ExplainedPassage, ExplainedToken
from knnlm.options import DomainOptions, KnnOptions
from knnlm.pipeline import Pipeline
from tests.cli.conftest import Knnlm
from tests.contract.system import TEXT, system
from tests.contract.system import store as toys

__all__ = ["toys"]

HOSTILE = '</a></section><script>alert(1)</script><img src="http://evil/x" onerror=alert(1)> "\'& \x1b[31m\x00\x9b'

ATTRIBUTES = {"href", "style", "title", "class", "id", "lang", "charset", "http-equiv", "content", "name"}


def hostile() -> Explained:
    passage = ExplainedPassage(HOSTILE, HOSTILE, 3, 1.5, 0.5, HOSTILE, f"{HOSTILE} and after")
    components = [
        ExplainedComponent("lm", "lm", 0.6, -2.0, []),
        ExplainedComponent(HOSTILE, "knn", 0.4, -0.5, [passage]),
    ]
    token = ExplainedToken(5, HOSTILE, -1.2, -2.0, 0.4, components)
    documents = [DocumentShare(HOSTILE, HOSTILE, 0.2, 0.7, 1)]
    return Explained(HOSTILE, [], HOSTILE, HOSTILE, [token], documents, -1.2, -2.0, 3.3, 7.4, 64, 32)


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_hostile_texts_as_texts() -> None:
    page = Page(explained_page(hostile()))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "iframe", "link", "object", "base", "form"})
    for tag, attributes in page.tags:
        assert set(attributes) <= ATTRIBUTES, tag
        assert attributes.get("href") in (None, "#t0"), tag
    assert page.text.count("<script>alert(1)</script>") >= 8
    meta = next(a for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert meta["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert [a["id"] for tag, a in page.tags if tag == "section"] == ["t0"]


def test_the_page_fetches_nothing() -> None:
    page = explained_page(replace(hostile(), degraded=None)).replace("http://evil/x", "")
    assert "http:" not in page
    assert "https:" not in page
    assert "url(" not in page


def test_a_terminal_takes_no_orders_from_a_text() -> None:
    answer = hostile()
    assert "\x1b" not in shaded(answer).plain
    assert "\x9b" not in shaded(answer).plain
    assert printable("a\tb\n\x1b]0;title\x07 é日") == "a\tb\n\ufffd]0;title\ufffd é日"


def test_tokens_are_shaded_by_what_retrieval_gave() -> None:
    """All, some and nothing of a token's probability: weight times p over p."""

    def token(log_p: float | None, weight: float, knn: float | None) -> ExplainedToken:
        components = [
            ExplainedComponent("lm", "lm", 1 - weight, -1.0, []),
            ExplainedComponent("d", "knn", weight, knn, []),
        ]
        return ExplainedToken(1, "x", log_p, -1.0, weight, components)

    tokens = [token(-0.5, 1.0, -0.5), token(-1.0, 0.5, -1.0), token(-1.5, 0.5, None), token(None, 1.0, None)]
    assert [t.retrieved for t in tokens] == pytest.approx([1, 0.5, 0, 0])
    text = shaded(replace(hostile(), tokens=tokens))
    grounds = [span.style.bgcolor for span in text.spans if not isinstance(span.style, str)]
    assert [g.triplet.green for g in grounds if g is not None and g.triplet] == [130, 185]


def test_explain_in_this_process_is_what_the_library_says(
    knnlm: Knnlm, store: Path, model: Path, tmp_path: Path
) -> None:
    text = "the cat sat on the mat"
    answer = knnlm("explain", text, "--domain", "toy", "--json", "--passages", 2, "--html", tmp_path / "page.html")
    with Pipeline.load(str(model), store, ["toy"]) as pipeline:
        expected = pipeline.explain(text, KnnOptions((DomainOptions("toy"),)), passages=2)
    given = answer.json
    assert [t["log_p"] for t in given["tokens"]] == pytest.approx(expected.log_probs.tolist())
    assert [(d["document"], d["tokens"]) for d in given["documents"]] == [
        (d.document, d.tokens) for d in expected.documents
    ]
    assert "the page is in" in answer.err
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert text in page.text
    assert len([tag for tag, _ in page.tags if tag == "section"]) == len(given["tokens"])

    shown = knnlm("explain", text, "--domain", "toy")
    assert shown.code == 0, shown.err
    assert text in shown.out
    assert f"{given['documents'][0]['document']} (toy)" in shown.out
    assert f"perplexity {expected.perplexity:.4f} (LM {expected.lm_perplexity:.4f})" in shown.out

    prompted = knnlm("explain", " on the mat", "--prompt", "the cat sat", "--domain", "toy", "--json").json
    tail = [t["log_p"] for t in given["tokens"]][-len(prompted["tokens"]) :]
    assert [t["log_p"] for t in prompted["tokens"]] == pytest.approx(tail)


async def test_explain_of_a_running_system_is_what_the_service_says(knnlm: Knnlm, toys: Path) -> None:
    async with system(toys) as s:
        url = f"http://127.0.0.1:{s.hosts['aggregator'].port}"
        expected = await s.post("/v1/explain", {"text": TEXT, "knn": {"domain": "cat", "k": 4}, "passages": 1})
        asked = ("explain", TEXT, "--remote", url, "--domain", "cat", "--k", 4, "--passages", 1, "--json")
        answer = await asyncio.to_thread(knnlm, *asked)
        assert answer.json == expected
        unknown = await asyncio.to_thread(knnlm, "explain", TEXT, "--remote", url, "--domain", "cow")
        assert (unknown.code, unknown.out) == (1, "")
        assert "unknown domain 'cow'" in unknown.err


def test_what_means_nothing_is_refused(knnlm: Knnlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = ("--remote", "http://127.0.0.1:1")
    monkeypatch.delenv("KNNLM_MODEL", raising=False)
    for arguments, problem in (
        (("x",), "give --model to load a model here, or --remote to ask a service"),
        (("x", *remote, "--store", tmp_path), "--store means nothing with --remote"),
        (("x", "--model", "m", "--api-key-file", tmp_path / "key"), "--api-key-file means nothing without --remote"),
        (("x", "--remote", "localhost"), "must begin with http://"),
        (("x", "--passages", -1), "--passages must be at least 0, got -1"),
        (("", *remote), "the text is empty"),
    ):
        answer = knnlm("explain", *arguments)
        assert (answer.code, answer.out) == (2, ""), arguments
        assert problem in answer.err


def test_the_page_is_written_whole_or_not_at_all(knnlm: Knnlm, store: Path, tmp_path: Path) -> None:
    answer = knnlm("explain", "the cat", "--html", tmp_path / "nowhere" / "page.html")
    assert answer.code == 1
    assert "cannot write" in answer.err
    assert json.loads(knnlm("explain", "the cat", "--json", "--html", tmp_path / "page.html").out)["documents"] == []
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["page.html"]
