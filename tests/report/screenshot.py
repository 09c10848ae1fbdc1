"""Take a picture of a page: `PYTHONPATH=tests python tests/report/screenshot.py docs/report.png [--page report.html]`.

Without `--page`, a page over the demo's pool is drawn, whose scores and outcomes are made up.
Needs playwright and chromium.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

import page_examples
from gradsift.report.html import render

DEMO_POOL = Path(__file__).parents[2] / "src" / "gradsift" / "demo" / "data" / "pool.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--full", action="store_true", help="the whole page, not just its top")
    parser.add_argument("--open", action="store_true", help="open everything that can be opened")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = options.page or Path(folder) / "report.html"
        if options.page is None:
            pool = [json.loads(line) for line in DEMO_POOL.read_text(encoding="utf-8").splitlines()]
            page_file.write_text(render(page_examples.report_page(pool)), encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": options.width, "height": options.height},
            color_scheme="dark" if options.dark else "light",
        )
        page.goto(page_file.resolve().as_uri())
        if options.open:
            page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
        page.screenshot(path=options.picture, full_page=options.full)
        browser.close()


if __name__ == "__main__":
    main()
