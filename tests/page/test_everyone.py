"""Whoever looks, whatever is in the store: keys, hostile texts, small screens, keyboards and screen readers."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from knnlm.datastore.updates.revise import with_tuning
from knnlm.testing import toy_datastore
from tests.contract.system import TUNING, store
from tests.page.browser import DESK, PHONE, looking

__all__ = ["store"]
pytestmark = pytest.mark.page
KEYS: Any = {"api_keys": (SecretStr("ordinary"),), "admin_api_keys": (SecretStr("admin"),)}
HOSTILE = "<img src=x onerror='window.broken=1'><script>window.broken=1</script>\"'>&lt;b&gt;"
TABS = ("next", "generate", "score", "domains")
UNNAMED = """() => [...document.querySelectorAll("button, input, select, textarea, [role=tab], [role=listbox]")]
  .filter(e => !e.labels?.length && !e.ariaLabel && !e.innerText?.trim() && e.checkVisibility())
  .map(e => e.outerHTML)"""


async def test_a_key_is_asked_for_once_and_kept_in_memory_alone(store: Path) -> None:
    async with looking(store, "a.domain=cat&b.domain=dog&text=the cat", **KEYS) as looked:
        await looked.sees("#key-why", "an API key is needed")
        await looked.page.keyboard.type("wrong")
        await looked.page.keyboard.press("Enter")
        await looked.sees("#key-why", "a wrong one was given")
        await looked.page.get_by_label("Key", exact=True).last.fill("ordinary")
        await looked.page.get_by_role("button", name="Use").click()
        await looked.sees("#next-a [role=status]", "cat v1")
        await looked.sees("#next-b [role=status]", "dog v1")
        await looked.page.get_by_role("tab", name="Domains").click()
        cat = looked.page.get_by_label("Domain cat", exact=True)
        await cat.get_by_label("Version of cat").select_option("v2")
        await cat.get_by_role("button", name="Switch").click()
        await looked.sees("#key-title", "Admin key")
        await looked.page.keyboard.press("Escape")
        await looked.sees("[role=alert]", "admin_api_keys")
        await cat.get_by_role("button", name="Switch").click()
        await looked.sees("#key-title", "Admin key")
        await looked.page.keyboard.type("admin")
        await looked.page.keyboard.press("Enter")
        await looked.sees("#domains-status", "cat answers from v2.")
        kept = await looked.page.evaluate(
            "() => JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
            " + document.documentElement.outerHTML + [...document.querySelectorAll('input')].map(i => i.value)"
        )
        assert "ordinary" not in kept
        assert '"admin' not in kept
        await looked.page.reload()
        await looked.sees("#key-title", "API key")  # gone with the page


async def test_without_a_key_the_service_s_sentence_is_shown(store: Path) -> None:
    async with looking(store, **KEYS) as looked:
        await looked.sees("#key-title", "API key")
        await looked.page.get_by_role("button", name="Cancel").click()
        await looked.sees("[role=alert]", "an API key is needed")
        assert not await looked.page.locator("dialog").is_visible()
        await looked.page.get_by_role("button", name="Key", exact=True).click()
        await looked.page.keyboard.type("ordinary")
        await looked.page.keyboard.press("Enter")
        await looked.sees("#model", "toy")
        await looked.page.locator("[role=alert]").wait_for(state="hidden")


async def test_what_documents_and_links_hold_is_shown_as_text(store: Path) -> None:
    texts = [f"the cat sat on {HOSTILE} and the mat", "the dog"]
    with_tuning(toy_datastore(store, domain="hostile", texts=texts), TUNING)
    async with looking(store, "tab=domains") as looked:
        hostile = looked.page.get_by_label("Domain hostile", exact=True)
        await hostile.get_by_text("Documents", exact=True).click()
        await hostile.get_by_label("Id of the document").fill(HOSTILE)
        await hostile.get_by_label("Text of the document").fill(f"the cat sat on {HOSTILE}")
        await hostile.get_by_role("button", name="Add").click()
        await looked.sees("#domains-status", "1 added")
        await looked.page.goto("about:blank")
        link = f"a.domain=hostile&b.domain={HOSTILE}&text=the cat sat on <img&scored=the cat sat on {HOSTILE}"
        await looked.goes(link.replace("&lt;b&gt;", ""))
        await looked.sees("#next-a .source b", HOSTILE)
        await looked.sees("#next-a .passage", "<img src=x")
        await looked.page.get_by_role("tab", name="Score").click()
        await looked.page.get_by_role("button", name="Score").click()
        await looked.sees("#score-result dl", "with hostile")
        await looked.page.locator("#score-result [role=option]").nth(20).click()
        await looked.sees("#score-detail .passage", "<img src=x")
        assert await looked.page.evaluate("window.broken") is None
        assert await looked.page.locator("main img, main script").count() == 0


@pytest.mark.parametrize(("viewport", "dark"), [(PHONE, False), (DESK, True)])
async def test_nothing_is_wider_than_the_screen_and_all_controls_have_names(
    store: Path, viewport: dict[str, int], dark: bool
) -> None:
    link = f"a.domain=cat&b.domain=dog&text={'the cat ' * 9}"
    async with looking(store, link, viewport=viewport, dark=dark) as looked:
        await looked.sees("#next-a [role=status]", "cat v1")
        for tab in TABS:
            if await looked.page.locator(f"#tab-{tab}").is_visible():
                await looked.page.locator(f"#tab-{tab}").click()
                await looked.page.locator(f"#panel-{tab}").wait_for()
                assert await looked.page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], tab
                assert await looked.page.evaluate(UNNAMED) == []
        background = await looked.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(int(part) for part in background[4:-1].split(",")) < 3 * 128) == dark


async def test_the_keyboard_alone_is_enough(store: Path) -> None:
    async with looking(store, "a.domain=cat&text=the cat") as looked:
        await looked.sees("#next-a [role=status]", "cat v1")
        await looked.page.keyboard.press("Tab")
        assert await looked.page.evaluate("document.activeElement.id") == "skip"
        await looked.page.keyboard.press("Tab")
        assert await looked.page.evaluate("document.activeElement.id") == "tab-next"
        await looked.page.keyboard.press("End")
        assert await looked.page.evaluate("document.activeElement.id") == "tab-domains"
        assert await looked.page.locator("#tab-domains").get_attribute("aria-selected") == "true"
        await looked.page.keyboard.press("ArrowRight")
        for _ in range(3):
            await looked.page.keyboard.press("Tab")
        assert await looked.page.evaluate("document.activeElement.tagName") == "SELECT"
        await looked.page.keyboard.press("ArrowDown")
        await looked.sees("#next-a [role=status]", "dog v1")


async def test_a_service_that_is_gone_is_told_of(store: Path) -> None:
    async with looking(store, "text=the cat") as looked:
        await looked.sees("#next-a .bars", "LM")
        await looked.page.route("**/v1/*", lambda route: route.abort())
        await looked.page.locator("#next-text").fill("the dog")
        await looked.sees("[role=alert]", "The service cannot be reached.")


async def test_when_retrieval_is_down_the_page_says_so_and_the_lm_answers(store: Path) -> None:
    async with looking(store, "text=the cat") as looked:
        await looked.sees("#next-a [role=status]", "8 tokens")
        await looked.services.hosts["datastore"].shut()
        await looked.page.reload()
        await looked.sees("[role=alert]", "datastore")
        await looked.page.locator("#next-a .domain select").first.select_option("")
        await looked.sees("#next-a [role=status]", "8 tokens")
        await looked.sees("#next-a .bars thead", "LM")
