"""What is told of work whose end nobody knows."""

from __future__ import annotations

import pytest

from gradsift.base import progress


def test_things_without_a_number_are_counted_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They come as they are; a line stands for every 15 s, and none for what is done before."""
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    assert list(progress.Reporter().counted("reading the pool", range(700))) == list(range(700))
    assert capsys.readouterr().err == "reading the pool: 256 rows, 20 s\n"
    assert list(progress.silent().counted("reading the pool", range(300))) == list(range(300))
    assert capsys.readouterr().err == ""
