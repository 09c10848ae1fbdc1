"""Pages in the run folder: each beside the JSON of its blocks, from which it can be written again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from gradsift.base.errors import ConfigError, CorruptError
from gradsift.report.blocks import Page
from gradsift.report.html import render
from gradsift.store.run import Run

_KEPT = {"report.html": "report.json"}  # others: NAME.page.json
_AGAIN = {
    "report.html": "`gradsift select` or `gradsift explain`",
    "comparison.html": "`gradsift compare`",
    "bench.html": "`gradsift bench`",
}


def kept_as(key: str) -> str:
    """The key of what a page is written again from."""
    return _KEPT.get(key, f"{key.removesuffix('.html')}.page.json")


def page_of(key: str) -> str:
    """The key of the page that is written again from what has this one; other keys as they are."""
    return f"{key.removesuffix('.page.json')}.html" if key.endswith(".page.json") else key


def publish_page(run: Run, key: str, page: Page) -> str:
    """Write a page, and its blocks beside it. Returns the key."""
    run.storage.publish(kept_as(key), page.to_json())
    run.publish_text(key, render(page))
    return key


def kept_page(run: Run, key: str) -> Page:
    """A page as it was left in the run folder; CorruptError if it is damaged, or kept by another version."""
    content = run.storage.read(kept_as(key))
    try:
        return Page.of_json(content)
    except ValidationError as error:
        again = f"run {_AGAIN.get(key, '`gradsift explain`')} again, it is quick"
        found = "is damaged"
        with suppress(ValueError):
            if isinstance(json.loads(content), Mapping):
                found = "is of another version of gradsift, which kept pages otherwise"
        raise CorruptError(f"{run.name(kept_as(key))} {found}: {again}") from error


def rewrite_report(out: str | Path) -> Path:
    """Write every page of a run folder again from its latest results; ConfigError where it holds none yet.

    Returns the path of report.html, or of comparison.html or bench.html where the folder holds such alone.
    """
    run = Run(out)
    keys = ["report.html", "comparison.html", "bench.html", "relevance.html", "explanation.html"]
    keys += [page_of(key) for key in run.storage.list("explanations/") if key.endswith(".page.json")]
    keys = [key for key in keys if run.storage.exists(kept_as(key))]
    if not {"report.html", "comparison.html", "bench.html"} & set(keys):
        raise ConfigError(
            f"{out} holds no results yet: run `gradsift select`, `gradsift explain`, `gradsift compare` or "
            "`gradsift bench` with this --out"
        )
    first, *_ = [run.publish_text(key, render(kept_page(run, key))) for key in keys]
    return first
