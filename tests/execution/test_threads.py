from __future__ import annotations

import threading

import pytest

from gradsift.execution.threads import side_by_side


@pytest.mark.parametrize("started", [False, True], ids=["before it runs", "after it runs"])
def test_an_interruption_while_a_thread_is_started_is_what_is_raised(
    monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    """Ctrl-C between the creation of a thread and the notice that it runs."""
    real, seen, silent = threading.Thread.start, list[str](), threading.Event()

    def start(thread: threading.Thread) -> None:
        seen.append(thread.name)
        if len(seen) == 1 or started:
            real(thread)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt):
        list(side_by_side(lambda _: silent.wait(), range(9), workers=3))
    silent.set()
    assert seen == ["worker-0", "worker-1"]
