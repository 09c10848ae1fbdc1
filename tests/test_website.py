"""The documentation as a site: it asks no other host, finds what is looked for, and no link of it is broken."""

from __future__ import annotations

import functools
import re
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import gradsift

ROOT = Path(__file__).parents[1]
BUILDER = ROOT / "build/docs-venv/bin/python"


@pytest.mark.slow
@pytest.mark.browser
def test_the_site_is_searched_and_read() -> None:
    """Built with strict links, the front page, the search, and every exported function's reference are there."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = next((path for path in map(Path, ("/usr/bin/chromium",)) if path.exists()), None)
    if chromium is None or not BUILDER.exists():
        pytest.skip("`make browser` and `make docs` first")
    subprocess.run([BUILDER, "docs/website.py"], cwd=ROOT, check=True)
    serve = functools.partial(SimpleHTTPRequestHandler, directory=str(ROOT / "build/site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server, sync_api.sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        site = f"http://127.0.0.1:{server.server_port}/"
        browser = playwright.chromium.launch(executable_path=str(chromium), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{site}index.html")
        assert "gradsift" in page.locator("h1").first.inner_text()
        picture = "document.querySelector('article img').naturalWidth"
        assert page.evaluate(picture) > 0
        page.keyboard.press("/")
        page.locator("input.md-search__input").fill("facility location")
        page.locator(".md-search-result__item").first.wait_for(timeout=20_000)
        page.goto(f"{site}docs/python.html")
        headings = page.locator("h2").all_inner_texts()
        lacking = [name for name in gradsift.__all__ if not any(re.match(rf"{name}\b", one) for one in headings)]
        assert lacking == []
        assert [url for url in asked if not url.startswith((site, "data:", f"blob:{site}"))] == []
        browser.close()
        server.shutdown()
