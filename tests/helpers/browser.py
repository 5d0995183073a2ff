"""A headless Chromium for tests of the page. Tests that need it are skipped, with the reason, where it is missing."""

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def needs_browser() -> pytest.MarkDecorator:
    """Skips a test where Playwright, axe or a Chromium is missing."""
    modules = [name for name in ("playwright", "axe_playwright_python") if importlib.util.find_spec(name) is None]
    missing = [*modules, *([] if CHROMIUM else ["a chromium on the PATH"])]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)} (the extra `browser`)")


@contextmanager
def opened(
    page_file: Path, width: int = 1300, theme: str = "light", suffix: str = "", bypass_csp: bool = False
) -> Iterator:
    """A page of the report. When the block ends, the console, a fault or a request must have said nothing.

    Args:
        suffix: the address's part after the file.
        bypass_csp: allow the test's own scripts, which the page's policy forbids.
    """
    # The module is part of an extra that most machines of developers do not have.
    from playwright.sync_api import sync_playwright

    messages: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        viewport = {"width": width, "height": 850}
        context = browser.new_context(viewport=viewport, color_scheme=theme, offline=True, bypass_csp=bypass_csp)
        page = context.new_page()
        page.on("console", lambda message: messages.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: messages.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (messages.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or messages.append(request.url))
        page.goto(f"file://{page_file}{suffix}")
        try:
            yield page
            assert messages == [], messages
        finally:
            browser.close()
