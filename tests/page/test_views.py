"""What a person does on the page, and sees."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from knnlm.datastore.catalog import Catalog
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.updates.revise import with_tuning
from knnlm.testing import ToyLanguageModel
from tests.contract.system import store
from tests.page.browser import Looked, looking

__all__ = ["store"]
pytestmark = pytest.mark.page
CAT = "a.domain=cat&text=the cat sat on the "
BARS = "#next-a .bars tbody tr"


async def slide(looked: Looked, label: str, place: float) -> None:
    slider = looked.page.locator("#next-a").get_by_label(label, exact=True)
    await slider.evaluate(
        "(slider, place) => { slider.value = place; slider.dispatchEvent(new Event('input')); }", str(place)
    )


async def test_bars_of_the_mixture_the_lm_and_retrieval_stand_side_by_side(store: Path) -> None:
    async with looking(store, CAT) as looked:
        await looked.sees("#next-a [role=status]", "cat v1, λ 0.3, T 2, k 6")
        assert (await looked.text("#next-a .bars thead")).split() == ["token", "mixture", "LM", "retrieval"]
        assert await looked.page.locator(BARS).count() == 12
        widths = await looked.page.locator(f"{BARS}:first-child .bar").evaluate_all(
            "bars => bars.map(b => b.offsetWidth)"
        )
        assert widths[2] > widths[0] > widths[1]  # the toy LM does not expect what the store has
        await looked.sees("#next-a .source", "distance")
        assert "mat and the dog" in await looked.text("#next-a .passages li:first-child .passage")


async def test_two_domains_stand_side_by_side(store: Path) -> None:
    async with looking(store, CAT) as looked:
        await looked.sees("#next-a [role=status]", "cat v1")
        await looked.page.locator("#next-b .domain select").first.select_option("dog")
        await looked.sees("#next-b [role=status]", "dog v1, λ 0.2")
        assert await looked.text("#next-a .bars") != await looked.text("#next-b .bars")


async def test_sliders_answer_at_once_and_go_back_to_what_was_tuned(store: Path) -> None:
    async with looking(store, CAT) as looked:
        await looked.sees("#next-a [role=status]", "λ 0.3")
        asked: list[str] = []
        looked.page.on("request", lambda request: asked.append(request.url))
        for hundredths in range(100, 0, -2):
            await slide(looked, "λ weight", hundredths / 100)
        await slide(looked, "λ weight", 0)
        await looked.sees("#next-a [role=status]", "λ 0,")
        cells = await looked.page.locator(f"{BARS} td").all_inner_texts()
        assert cells[0::3] == cells[1::3]  # the mixture is the LM
        assert len(asked) < 10
        await slide(looked, "k neighbors", 1)
        await looked.sees("#next-a [role=status]", "k 2")
        await slide(looked, "T temperature", 2)
        await looked.sees("#next-a [role=status]", "T 100, k 2")
        for control in ("λ weight", "T temperature", "k neighbors"):
            await looked.page.locator("#next-a").get_by_label(f"{control}: as tuned").click()
        await looked.sees("#next-a [role=status]", "λ 0.3, T 2, k 6")


async def test_a_domain_that_was_never_tuned_can_be_looked_at(store: Path) -> None:
    async with looking(store, "a.domain=raw&text=the cat") as looked:
        await looked.sees("#next-a [role=status]", "raw v1, λ 0.25, T 10")


async def test_the_service_s_own_sentence_is_shown_and_goes_when_all_is_well(store: Path) -> None:
    async with looking(store, CAT, max_k=64) as looked:
        await looked.sees("#next-a [role=status]", "cat v1")
        await slide(looked, "k neighbors", 12)
        await looked.sees("[role=alert]", "4096")
        assert "64" in await looked.text("[role=alert]")
        beside = looked.page.locator("#next-b .domain select").first
        await beside.select_option("dog")  # what is well beside it changes nothing
        await looked.sees("#next-b [role=status]", "dog v1")
        assert await looked.page.locator("[role=alert]").is_visible()
        await slide(looked, "k neighbors", 3)
        await looked.sees("#next-a [role=status]", "k 8")
        assert not await looked.page.locator("[role=alert]").is_visible()


async def test_without_retrieval_the_lm_is_there_alone(store: Path) -> None:
    async with looking(store, "text=the cat", replicas=0) as looked:
        await looked.sees("#next-a .bars thead", "LM")
        assert "mixture" not in await looked.text("#next-a .bars")


async def test_a_link_restores_what_was_looked_at_and_going_back_the_view_before(store: Path) -> None:
    link = "a.domain=dog&a.lambda=0.75&a.k=4&b.domain=cat&text=the+dog%0Asat"
    async with looking(store, link) as looked:
        await looked.sees("#next-a [role=status]", "dog v1, λ 0.75, T 2, k 4")
        await looked.sees("#next-b [role=status]", "cat v1")
        assert await looked.page.locator("#next-text").input_value() == "the dog\nsat"
        await looked.page.locator("#next-text").fill("a cat")
        await looked.page.get_by_role("tab", name="Domains").click()
        await looked.sees("#panel-domains h2", "dog")
        assert "tab=domains" in looked.page.url
        await looked.page.go_back()
        await looked.page.locator("#panel-next").wait_for()
        restored = looked.page.url.partition("#")[2]
        assert "text=a+cat" in restored
        await looked.page.goto("about:blank")
        await looked.goes(restored)
        await looked.sees("#next-a [role=status]", "dog v1, λ 0.75")
        assert await looked.page.locator("#next-text").input_value() == "a cat"
        await looked.goes("a.domain=nothing&a.lambda=7&a.k=many&tab=nowhere&text=x")  # as far as it makes sense
        await looked.sees("#next-a .bars thead", "LM")


async def test_a_scored_text_is_shaded_and_its_tokens_show_their_passages(store: Path) -> None:
    async with looking(store, "tab=score&a.domain=cat&scored=the cat sat on the mat") as looked:
        await looked.page.get_by_role("button", name="Score").click()
        await looked.sees("#score-result dl", "with cat v1")
        tokens = looked.page.locator("#score-result [role=option]")
        assert "".join(await tokens.all_text_contents()) == "the cat sat on the mat"
        assert await looked.page.locator("#score-result .strip .helped").count() > 10
        await tokens.first.focus()
        for key in ("End", "ArrowLeft", "Enter"):
            await looked.page.keyboard.press(key)
        assert await tokens.nth(20).get_attribute("aria-selected") == "true"
        await looked.sees("#score-detail h3", "Token a")
        assert (await looked.text("#score-detail tbody")).split()[:2] == ["lm", "0.7"]
        await looked.sees("#score-detail .passage", "the mat")
        await looked.page.get_by_text("Documents it leans on").click()
        await looked.sees("#score-result details td", "cat")


async def test_a_text_too_long_for_passages_is_scored_without(store: Path) -> None:
    async with looking(store, "tab=score&a.domain=cat&scored=the cat sat", max_explained_passages=20) as looked:
        await looked.page.get_by_role("button", name="Score").click()
        await looked.sees("#score-status", "The text is too long for passages.")
        await looked.sees("#score-result dl", "with cat v1")


async def test_a_prompt_is_continued_by_the_lm_and_beside_it_with_retrieval(store: Path) -> None:
    link = "tab=generate&a.domain=cat&a.lambda=0.9&prompt=the cat sat on&max_tokens=12&temperature=0"
    async with looking(store, link) as looked:
        await looked.page.get_by_role("button", name="Generate").click()
        await looked.sees("#generate-status", "LM: 12 tokens")
        await looked.sees("#generate-status", "with retrieval: 12 tokens")
        tokens = looked.page.locator("#generate-knn [role=option]")
        assert "".join(await tokens.all_text_contents()) == " the mat and"
        assert await looked.text("#generate-lm") != await looked.text("#generate-knn")
        assert await looked.page.locator("#generate-knn .strip .helped").count() > 6
        await tokens.nth(5).click()
        await looked.sees("#generate-detail h3", "Token m")
        await looked.sees("#generate-detail .passage", "the mat")


async def test_a_completion_can_be_stopped_and_one_that_is_refused_says_why(store: Path) -> None:
    async with looking(store, "tab=generate&a.domain=cat&prompt=the cat&a.k=64", max_k=8) as looked:
        await looked.page.get_by_role("button", name="Generate").click()
        await looked.sees("[role=alert]", "64")
        await looked.page.locator("#panel-generate").get_by_label("k neighbors: as tuned").click()
        await looked.page.route("**/v1/completions", lambda _: None)  # never answered
        await looked.page.get_by_role("button", name="Generate").click()
        await looked.sees("#generate-status", "Generating…")
        await looked.page.get_by_role("button", name="Stop").click()
        await looked.sees("#generate-status", "Stopped.")
        assert not await looked.page.locator("[role=alert]").is_visible()


async def test_domains_show_what_they_are_and_switch(store: Path) -> None:
    async with looking(store, "tab=domains") as looked:
        cat = looked.page.get_by_label("Domain cat", exact=True)
        await cat.wait_for()
        shown = " ".join((await cat.inner_text()).split())
        for fact in ("cat v1", "entries 290", "documents 4", "index flat", "λ 0.3", "rule fixed", "LM 9", "v1 ready"):
            assert fact in shown, fact
        await looked.sees("#domains .hint", "Never tuned")
        await cat.get_by_label("Version of cat").select_option("v2")
        await cat.get_by_role("button", name="Switch").click()
        await looked.sees("#domains-status", "cat answers from v2.")
        assert await cat.locator(".badge").inner_text() == "v2"
        await looked.page.get_by_role("tab", name="Next token").click()
        await looked.page.locator("#next-a .domain select").first.select_option("cat")
        await looked.sees("#next-a [role=status]", "cat v2")


async def test_documents_are_added_and_removed(store: Path) -> None:
    async with looking(store, "tab=domains") as looked:
        cat = looked.page.get_by_label("Domain cat", exact=True)
        await cat.get_by_text("Documents", exact=True).click()
        await cat.get_by_label("Id of the document").fill("birds")
        await cat.get_by_label("Text of the document").fill("a wren sang to the owl")
        await cat.get_by_role("button", name="Add").click()
        await looked.sees("#domains-status", "1 added, 0 removed")
        assert "documents 5" in " ".join((await cat.inner_text()).split())
        await looked.goes("a.domain=cat&text=a wren sang to the")
        await looked.sees("#next-a .source", "birds")
        await looked.goes("tab=domains")
        await cat.get_by_role("button", name="Remove").click()
        await looked.sees("#domains-status", "0 added, 1 removed")
        assert await looked.page.evaluate("document.activeElement.innerText") == "Remove"
        await cat.get_by_role("button", name="Remove").click()
        await looked.sees("[role=alert]", "birds")


async def test_what_goes_wrong_in_the_middle_of_a_stream_is_told(store: Path) -> None:
    begun = 'data: {"choices": [{"index": 0, "text": " mat", "finish_reason": null}]}\r\n\r\n'
    error = '{"error": {"message": "the datastore is gone", "type": "x", "param": null, "code": "unavailable"}}'
    async with looking(store, "tab=generate&a.domain=none&prompt=the cat") as looked:
        for end, told in ((f"data: {error}\n\ndata: [DONE]\n\n", "the datastore is gone"), ("", "ended early")):

            async def answer(route: Any, *, body: str = begun + end) -> None:
                await route.fulfill(body=body, content_type="text/event-stream")

            await looked.page.route("**/v1/completions", answer)
            await looked.page.get_by_role("button", name="Generate").click()
            await looked.sees("[role=alert]", told)
            assert await looked.text("#generate-lm") == " mat"
            await looked.page.unroute("**/v1/completions")


TORN = """async (text) => {
  const { eventData } = await import("./web/api.js");
  const bytes = [...new TextEncoder().encode(text)];
  const body = new ReadableStream({
    start(out) { bytes.forEach((byte) => out.enqueue(new Uint8Array([byte]))); out.close(); },
  });
  const found = [];
  for await (const data of eventData(body)) found.push(data);
  return found;
}"""


async def test_events_are_read_however_their_bytes_arrive(store: Path) -> None:
    sent = "data: naïve 🐈\r\n\r\n: a comment\n\ndata:a\ndata: b\n\ndata: cut"
    async with looking(store, "text=the cat") as looked:
        assert await looked.page.evaluate(TORN, sent) == ["naïve 🐈", "a\nb"]


async def test_a_memory_is_chosen_beside_a_domain_or_instead_of_it(store: Path) -> None:
    memories = {"law": ToyLanguageModel(seed=5)}
    async with looking(store, f"{CAT}&a.memory=law&a.memory_lambda=0.2", memories=memories) as looked:
        await looked.sees("#next-a [role=status]", "cat v1, λ 0.3, T 2, k 6; memory law, λ 0.2")
        heads = (await looked.text("#next-a .bars thead")).split()
        assert heads == ["token", "mixture", "LM", "retrieval", "memory"]
        assert await looked.page.locator(f"{BARS}:first-child .bar.p_memory").count() == 1
        await looked.page.locator("#next-a").get_by_label("Domain", exact=True).select_option("")
        await looked.page.locator("#next-a .bars thead").filter(has_not_text="retrieval").wait_for()
        assert (await looked.text("#next-a .bars thead")).split() == ["token", "mixture", "LM", "memory"]
        await looked.page.locator("#next-a").get_by_label("λ of the memory: as tuned").click()
        await looked.sees("[role=alert]", "has no fitted weight")
        await looked.goes("tab=generate&prompt=the cat&a.memory=law&a.memory_lambda=0.5&max_tokens=4&temperature=0")
        await looked.page.locator("#generate-go").click()
        await looked.sees("#generate-status", "with retrieval: 4 tokens")
        await looked.page.locator("#generate-knn [role=option], #generate-knn button").first.click()
        await looked.sees("#generate-detail", "law")
        await looked.goes("tab=score&scored=the cat sat&a.memory=law&a.memory_lambda=0.5")
        await looked.page.locator("#score-go").click()
        await looked.sees("#score-result", "with memory law")


async def test_without_a_memory_there_is_no_control_of_it(store: Path) -> None:
    async with looking(store, CAT) as looked:
        await looked.sees("#next-a [role=status]", "cat v1")
        assert not await looked.page.get_by_label("Memory").first.is_visible()


async def test_the_cache_is_mixed_beside_a_domain_and_kept_in_the_link(store: Path) -> None:
    async with looking(store, f"{CAT}&a.cache=on&a.cache_lambda=0.2&a.cache_theta=0.1") as looked:
        await looked.sees("#next-a [role=status]", "cat v1, λ 0.3, T 2, k 6; cache, λ 0.2")
        heads = (await looked.text("#next-a .bars thead")).split()
        assert heads == ["token", "mixture", "LM", "retrieval", "cache"]
        assert await looked.page.locator(f"{BARS}:first-child .bar.p_cache").count() == 1
        await looked.page.locator("#next-a").get_by_label("λ of the cache: as tuned").click()
        await looked.sees("#next-a [role=status]", "cache, λ 0.1")  # the domain was not tuned with a cache
        await looked.page.locator("#next-a").get_by_label("Cache", exact=True).select_option("none")
        await looked.sees("#next-a [role=status]", "cat v1, λ 0.3, T 2, k 6 ·")
        await looked.goes("tab=score&scored=the cat sat on the cat&a.cache=on&a.cache_lambda=0.5")
        await looked.page.locator("#score-go").click()
        await looked.sees("#score-result", "with cache")


async def test_a_domain_that_was_tuned_for_a_rule_offers_it_and_fixed(store: Path) -> None:
    path = Catalog(store).path("cat", "v1")
    tuning = Manifest.load(path).tuning
    assert tuning is not None
    with_tuning(path, replace(tuning.message(), rule="bins", parameters={"edges": [], "lambdas": [0.45]}))
    async with looking(store, CAT) as looked:
        await looked.sees("#next-a [role=status]", "cat v1, λ 0.45")
        await looked.page.locator("#next-a").get_by_label("Rule", exact=True).select_option("fixed")
        await looked.sees("#next-a [role=status]", "cat v1, λ 0.3")
        await looked.goes(f"{CAT}&a.rule=fixed")
        await looked.sees("#next-a [role=status]", "cat v1, λ 0.3")
