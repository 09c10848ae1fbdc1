"""Take a picture of a page: `python tests/report/screenshot.py runs/demo/report.html docs/report.png`.

Needs playwright and chromium.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--to", help="a CSS selector of what is scrolled to the top")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--full", action="store_true", help="the whole page, not just its top")
    parser.add_argument("--open", action="store_true", help="open everything that can be opened")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": options.width, "height": options.height},
            color_scheme="dark" if options.dark else "light",
        )
        page.goto(options.page.resolve().as_uri())
        if options.open:
            page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
        if options.to:
            page.locator(options.to).evaluate("(one) => window.scrollTo(0, one.getBoundingClientRect().top - 16)")
        page.screenshot(path=options.picture, full_page=options.full)
        browser.close()


if __name__ == "__main__":
    main()
