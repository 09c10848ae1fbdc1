"""Ctrl-C inside libraries: whatever they make of it, the run ends as interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest

from gradsift.__main__ import main
from gradsift.base.errors import ModelError
from gradsift.base.interruption import pressed, refuse_to_go_on, watching
from gradsift.cli import _errors


@pytest.fixture(autouse=True)
def usual_handler() -> Iterator[None]:
    """As in a program that nobody else has set up."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def swallowed() -> Iterator[None]:
    """What safetensors does with an exception that is raised while it reads."""
    try:
        yield
    except KeyboardInterrupt:
        raise ModelError("cannot load the adapter") from None


def test_an_interruption_that_comes_out_as_an_error_is_an_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with 130 and the sentence of an interruption, and not with the library's complaint."""
    with pytest.raises(click.exceptions.Exit) as ended, _errors(debug=False), swallowed():
        os.kill(os.getpid(), signal.SIGINT)
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err.startswith("\ninterrupted: ")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_work_that_notes_errors_and_goes_on_stops(capsys: pytest.CaptureFixture[str]) -> None:
    """Where an error is noted for a cell or a metric, it ends the run if Ctrl-C was pressed; without, it does not."""
    with watching():
        refuse_to_go_on(ModelError("of its own"))
        with pytest.raises(ModelError), swallowed():
            os.kill(os.getpid(), signal.SIGINT)
        assert pressed()
        with pytest.raises(KeyboardInterrupt):
            refuse_to_go_on(ModelError("x"))
    with watching():
        assert not pressed()


def test_what_a_library_makes_of_it_leaves_as_an_interruption() -> None:
    """Ctrl-C while a condition lets go of its lock comes out of it as that of a lock which is not held."""

    def waited(*, signalled: bool) -> None:
        lock = threading.Condition()
        with watching(), lock:
            lock.release()
            if signalled:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        waited(signalled=True)
    with pytest.raises(RuntimeError):
        waited(signalled=False)


def test_somebody_elses_handler_stays() -> None:
    """A program that handles SIGINT itself keeps its handler."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with watching():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_interrupted_before_it_is_read(tmp_path: Path) -> None:
    """Ctrl-C while the command line's own modules are imported is one sentence and 130, no traceback."""
    (tmp_path / "click.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    paths = [str(tmp_path), str(Path(__file__).parents[2] / "src")]
    code = f"import sys; sys.path[:0] = {paths!r}; from gradsift.__main__ import main; main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "\ninterrupted: nothing was begun\n")


def test_interrupted_while_the_commands_are_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same sentence when the options are still being put together, before any command runs."""

    def building() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gradsift.cli.app", building)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted: nothing was begun\n"
