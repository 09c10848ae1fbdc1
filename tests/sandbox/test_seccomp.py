from __future__ import annotations

import errno

import pytest

from gradsift.sandbox._seccomp import syscall_filter

OWN = 4242
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
KILL_PROCESS, ALLOW = 0x80000000, 0x7FFF0000
REFUSE, UNKNOWN = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS


def decide(
    machine: str,
    number: int,
    *arguments: int,
    architecture: int | None = None,
    attributes: bool = True,
) -> int:
    """What the kernel would do: classic BPF, the five instructions that the filter uses, one after the other."""
    data = {0: number, 4: ARCHITECTURES[machine] if architecture is None else architecture}
    for place in range(6):
        value = arguments[place] if place < len(arguments) else 0
        data |= {16 + 8 * place: value & 0xFFFFFFFF, 20 + 8 * place: value >> 32}
    lines = syscall_filter(machine, attributes=attributes)
    assert lines is not None
    position = value = 0
    while True:
        code, if_true, if_false, operand = lines[position]
        k = OWN if operand is None else operand
        position += 1
        match code:
            case 0x20:
                value = data[k]
            case 0x06:
                return k
            case _:
                holds = {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code]
                position += if_true if holds else if_false


@pytest.mark.parametrize(
    ("machine", "socket", "kill", "tgkill", "prlimit64", "clone", "openat"),
    [("x86_64", 41, 62, 234, 302, 56, 257), ("aarch64", 198, 129, 131, 261, 220, 56)],
)
def test_the_filter_refuses_what_reaches_others(
    machine: str, socket: int, kill: int, tgkill: int, prlimit64: int, clone: int, openat: int
) -> None:
    """Sockets never; signals and limits on the program itself only; new processes but no new user namespaces."""
    assert decide(machine, socket, 2) == REFUSE
    assert decide(machine, socket, 1) == REFUSE
    for number in (kill, tgkill):
        assert decide(machine, number, OWN) == ALLOW
        for other in (0, 1, OWN + 1, 0xFFFFFFFF):
            assert decide(machine, number, other) == REFUSE
    assert decide(machine, prlimit64, 0) == ALLOW
    assert decide(machine, prlimit64, OWN) == ALLOW
    assert decide(machine, prlimit64, 1) == REFUSE
    assert decide(machine, clone, 17) == ALLOW
    assert decide(machine, clone, 0x10000000 | 17) == REFUSE
    assert decide(machine, 435) == UNKNOWN
    assert decide(machine, openat) == ALLOW


def test_other_ways_into_the_kernel_are_closed() -> None:
    """32-bit calls end the program, and x32 numbers, which mean other calls, are refused."""
    assert decide("x86_64", 102, architecture=0x40000003) == KILL_PROCESS
    assert decide("x86_64", 0x40000000 + 41) == REFUSE


def test_an_unknown_machine_has_no_filter() -> None:
    """Numbers differ between machines: where they are not known, none is made up."""
    assert syscall_filter("sparc64") is None


NUMBERS = {  # fcntl, ioctl, socketpair, sendto, memfd_create, shmget, process_vm_readv, io_uring_setup, chmod or fchmod
    "x86_64": (72, 16, 53, 44, 319, 29, 310, 425, 90),
    "aarch64": (25, 29, 199, 206, 279, 194, 270, 425, 52),
}


@pytest.mark.parametrize("machine", NUMBERS)
def test_arguments_decide_where_a_call_has_two_faces(machine: str) -> None:
    """No owner of a file's signals, no address to send to, no socket but a pair of its own, nobody's memory."""
    fcntl, ioctl, socketpair, sendto, memfd, shmget, readv, uring, chmod = NUMBERS[machine]
    for command in (0, 1, 2, 3, 4, 6, 1030):
        assert decide(machine, fcntl, 5, command) == ALLOW
    for command in (8, 10, 15, 1024, 1026, 1031, 1033, 0xFFFFFFFF):  # F_SETOWN, F_SETSIG, F_SETOWN_EX, leases, …
        assert decide(machine, fcntl, 5, command) == REFUSE
    assert decide(machine, ioctl, 0, 0x5401) == ALLOW
    for request in (0x8901, 0x8902, 0x5452, 0x5412):  # FIOSETOWN, SIOCSPGRP, FIOASYNC, TIOCSTI
        assert decide(machine, ioctl, 0, request) == REFUSE
    assert decide(machine, socketpair, 1) == ALLOW
    assert decide(machine, socketpair, 2) == REFUSE
    assert decide(machine, sendto, 3, 4, 5, 0, 0, 0) == ALLOW
    assert decide(machine, sendto, 3, 4, 5, 0, 1 << 40, 16) == REFUSE
    assert decide(machine, sendto, 3, 4, 5, 0, 1, 16) == REFUSE
    for number in (memfd, shmget, readv, uring):
        assert decide(machine, number) == REFUSE
    assert decide(machine, chmod) == ALLOW
    assert decide(machine, chmod, attributes=False) == REFUSE


@pytest.mark.parametrize("machine", NUMBERS)
def test_what_is_not_on_the_list_is_refused(machine: str) -> None:
    """Of all numbers up to 1000 less than 250 are allowed as they are; those that are newer are unknown."""
    allowed = [number for number in range(1000) if decide(machine, number) == ALLOW]
    assert 150 < len(allowed) < 250
    assert all(decide(machine, number) == UNKNOWN for number in range(453, 1000))
    for mask in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000, 0x8000):
        assert decide(machine, {"x86_64": 56, "aarch64": 220}[machine], 17 | mask) == REFUSE
