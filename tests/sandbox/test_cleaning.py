"""Clean-up after hostile programs: by descriptors, through no link, at any depth."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest

from gradsift.sandbox._cleaning import open_folder, remove, sweep
from gradsift.sandbox._confinement import memory_group

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")


def test_everything_goes_and_nothing_that_a_link_points_to(tmp_path: Path) -> None:
    """500 folders in each other, closed ones, links to files and folders, a pipe, odd names: the rest stays."""
    kept, folder = tmp_path / "kept", tmp_path / "scratch"
    kept.mkdir(mode=0o500)
    folder.mkdir()
    before = kept.stat()
    (folder / "link").symlink_to(kept)
    (folder / "nowhere").symlink_to(tmp_path / "none")
    os.mkfifo(folder / "pipe")
    (folder / os.fsdecode(b"\xff\n")).write_text("x")
    inner = os.open(folder, os.O_RDONLY)
    for _ in range(500):
        os.mkdir("d", dir_fd=inner)
        os.symlink(kept, "inner", dir_fd=inner)
        inner, outer = os.open("d", os.O_RDONLY, dir_fd=inner), inner
        os.close(outer)
    os.close(inner)
    (folder / "d").chmod(0)
    (folder / "closed").mkdir()
    (folder / "closed" / "file").write_text("x")
    (folder / "closed").chmod(0)
    remove(open_folder(str(folder)))
    assert not folder.exists()
    after = kept.stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_a_folder_is_removed_under_its_new_name(tmp_path: Path) -> None:
    """Renamed behind its back, with a link in its old place: what was opened goes, the link's target stays."""
    kept, folder = tmp_path / "kept", tmp_path / "scratch"
    kept.mkdir()
    folder.mkdir()
    opened = open_folder(str(folder))
    (folder / "file").write_text("x")
    folder.rename(tmp_path / "moved")
    folder.symlink_to(kept)
    remove(opened)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "scratch"]


def test_a_link_is_no_folder(tmp_path: Path) -> None:
    """What is to be opened as a folder is never followed."""
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        open_folder(str(tmp_path / "link"))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_empties_closed_folders(tmp_path: Path) -> None:
    """Without root's rights closed folders are opened first, at any depth, and never through a link."""
    tmp_path.chmod(0o755)
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    os.chown(folder, 54321, 54321)
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(54321, 54321, 54321)
            os.setresuid(54321, 54321, 54321)
            deepest = folder / "a/b/c"
            deepest.mkdir(parents=True)
            (deepest / "file").write_text("x")
            (deepest / "link").symlink_to(tmp_path)
            for path in (deepest, *deepest.parents[:2]):
                path.chmod(0)
            remove(open_folder(str(folder)))
        finally:
            os._exit(int(folder.exists()))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root has files of other users, and may remove them")
def test_what_a_made_user_left_is_swept_and_no_more() -> None:
    """Its files, folders and shared memory go; another user's beside them stay."""
    mark, made, other = uuid.uuid4().hex, 1_999_999_998, 1_999_999_996
    libc = "import ctypes; libc = ctypes.CDLL(None); "
    for user in (made, other):
        folder = Path("/dev/shm") / f"{mark}-{user}"
        (folder / "inner").mkdir(parents=True)
        (folder / "link").symlink_to("/etc")
        os.chown(folder, user, user)
        take = f"import os; {libc}os.setgid({user}); os.setuid({user}); assert libc.shmget(0, 4096, 0o1600) >= 0"
        subprocess.run([sys.executable, "-S", "-c", take], check=True)
    try:
        sweep({made})
        assert [path.name for path in Path("/dev/shm").glob(f"{mark}*")] == [f"{mark}-{other}"]
        owners = Path("/proc/sysvipc/shm").read_text().split()
        assert str(other) in owners
        assert str(made) not in owners
    finally:
        sweep({other})
    assert not list(Path("/dev/shm").glob(f"{mark}*"))


def test_a_control_group_ends_what_takes_too_much() -> None:
    """Its limit holds for all processes in it together; it is gone when they are."""
    group = memory_group(64 << 20)
    if group is None:
        pytest.skip("no control group with a memory limit can be made here")
    take = (
        "import os, sys, time\nos.write(int(sys.argv[1]), b'0')\nfor _ in range(3):\n    if os.fork() == 0:\n"
        "        block = bytearray(b'x' * (40 << 20))\n        time.sleep(20)\n        os._exit(0)\n"
        "print([os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(1)])\nos.killpg(0, 9)\n"
    )
    command = [sys.executable, "-S", "-c", take, str(group.entrance)]
    try:
        found = subprocess.run(
            command, pass_fds=[group.entrance], capture_output=True, timeout=60, check=False, start_new_session=True
        )
        assert group.kills() > 0, found
    finally:
        group.close()
    assert not group.folder.exists()
