"""The page as a person has it before them: the three services over toys, and a headless Chromium that looks at them."""

import importlib
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.contract.system import System, system

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
DESK = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}
WAIT_MS = 15_000


@dataclass
class Looked:
    """A page that is open. page: playwright's. complaints: what the browser's console had to say of it. elsewhere:
    addresses of other places that it asked for."""

    page: Any
    url: str
    services: System
    complaints: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def heard(self, message: Any) -> None:
        # an answer of 400 or 401 is a message of the console's, too: the page shows it
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.complaints.append(message.text)

    def asked(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:")):
            self.elsewhere.append(request.url)

    async def text(self, selector: str) -> str:
        return str(await self.page.locator(selector).inner_text())

    async def sees(self, selector: str, text: str) -> None:
        """Waits until an element shows the text."""
        await self.page.locator(selector).filter(has_text=text).first.wait_for(timeout=WAIT_MS)

    async def goes(self, fragment: str) -> None:
        await self.page.goto(f"{self.url}/#{fragment}")


@asynccontextmanager
async def looking(
    store: Path, fragment: str = "", *, viewport: dict[str, int] | None = None, dark: bool = False, **settings: Any
) -> AsyncIterator[Looked]:
    """The page of an aggregator with these settings. Ends with an error when the browser complained, or when the page
    asked for anything from elsewhere."""
    playwright = importlib.import_module("playwright.async_api")  # of .venv-page: only these tests need it
    async with system(store, **settings) as services, playwright.async_playwright() as driver:
        found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
        browser = await driver.chromium.launch(executable_path=found, chromium_sandbox=False, args=FLAGS)
        context = await browser.new_context(viewport=viewport or DESK, color_scheme="dark" if dark else "light")
        page = await context.new_page()
        page.set_default_timeout(WAIT_MS)
        looked = Looked(page, f"http://127.0.0.1:{services.hosts['aggregator'].port}", services)
        page.on("console", looked.heard)
        page.on("pageerror", lambda problem: looked.complaints.append(str(problem)))
        page.on("request", looked.asked)
        await looked.goes(fragment)
        yield looked
        await browser.close()
    assert looked.complaints == []
    assert looked.elsewhere == []
