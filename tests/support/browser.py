"""A real headless Chromium for tests of the page."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.patience import patience

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
OWN = ("file:", "data:", "blob:", "http://127.0.0.1:")


def find_chromium() -> str | None:
    """The browser's program: CYTOSAE_TEST_CHROMIUM, or the first one on the path."""
    named = os.environ.get("CYTOSAE_TEST_CHROMIUM")
    return named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def browser_or_skip() -> Iterator[Any]:
    """A running browser, or a skip that says what is missing."""
    program = find_chromium()
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium, or set CYTOSAE_TEST_CHROMIUM to the program")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield browser
        browser.close()


class Visit:
    """An open page, and everything unexpected that happened on it."""

    def __init__(self, browser, url: str, *, width=1280, height=800, scheme="light") -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self._context.set_default_timeout(1000 * patience(60))
        self.page = self._context.new_page()
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("dialog", self._on_dialog)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = url
        self.page.goto(url)
        self.page.wait_for_selector("h1")

    def go(self, route: str) -> None:
        """Follow an address within the page."""
        self.page.evaluate("route => { location.hash = route; }", f"#/{route}")
        self.page.wait_for_function("() => !document.querySelector('[aria-busy]')")

    def close(self) -> None:
        self._context.close()
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith(OWN)] == []

    def _on_console(self, message) -> None:
        # The tests read canvases back, which Chromium warns about.
        if message.type in ("error", "warning") and "willReadFrequently" not in message.text:
            self.complaints.append(f"{message.type}: {message.text}")

    def _on_dialog(self, dialog) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()


def file_url(report: Path) -> str:
    """Address of a report on disk."""
    return (report / "index.html").resolve().as_uri()


PAINTED = """canvas => {
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  let sum = 0;
  for (let i = 3; i < data.length; i += 4) sum += data[i] > 0;
  return sum / (data.length / 4);
}"""
"""Share of a canvas's pixels that are painted."""
