"""What the tests of pages share: a watched browser."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

WEAK_TEXT = r"""
() => {
  const light = (rgb) => rgb.map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const parsed = (colour) => colour.match(/[\d.]+/g).map(Number)
    .map((part, at) => (colour.startsWith('color(srgb') && at < 3 ? 255 * part : part));
  const ground = (item) => {
    for (let at = item; at; at = at.parentElement) {
      const colour = parsed(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const found = new Set();
  for (const item of document.querySelectorAll('body *')) {
    const text = [...item.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!text || item.tagName === 'SCRIPT' || !item.checkVisibility()) continue;
    const style = getComputedStyle(item);
    const [a, b] = [parsed(item.closest('svg') ? style.fill : style.color), ground(item)].map(light);
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) found.add(`${item.tagName}.${item.className} ${contrast.toFixed(2)}`);
  }
  return [...found];
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium on PATH: apt-get install chromium")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens HTML; fails at the end on any console message, page error or request beyond the file itself."""
    contexts: list[Any] = []
    seen: list[str] = []
    file = tmp_path / "page.html"

    def opened(html: str, **options: Any) -> Any:
        file.write_text(html, encoding="utf-8")
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: seen.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: seen.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (seen.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url == file.as_uri() or seen.append(f"request: {request.url}"))
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert seen == []


@pytest.fixture(scope="session")
def weak_text() -> Callable[[Any], list[str]]:
    """Elements whose text has a contrast below 4.5 to the background it stands on (WCAG AA)."""
    return lambda page: page.evaluate(WEAK_TEXT)
