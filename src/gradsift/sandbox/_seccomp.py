"""A filter of system calls for one program: those that a program by itself needs, and no others.

It is a list of what is allowed. Left out is all that reaches other processes (signals, tracing, limits), the network,
memory that outlives its process or counts as nobody's (`memfd_create`, System V, POSIX queues), and the kernel's larger
machinery. It needs no privilege, so it works where namespaces are forbidden, as in most containers. What it refuses
fails with EPERM, an ordinary PermissionError to Python; calls newer than the list fail with ENOSYS, as on an older
kernel.
"""

from __future__ import annotations

import errno
import sys

_ATTRIBUTES = frozenset(
    [
        *("chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat"),
        *("utime", "utimes", "futimesat", "utimensat"),
    ]
)
# What is decided by an argument: its place, and the values that it may have; None is the program's own process id.
_BY_ARGUMENT: dict[str, tuple[int, tuple[int | None, ...]]] = {
    "kill": (0, (None,)),  # 0 would be the whole process group
    "tgkill": (0, (None,)),
    "prlimit64": (0, (0, None)),  # 0 is the caller
    "sched_setaffinity": (0, (0, None)),
    "socketpair": (0, (1,)),  # AF_UNIX: two ends of its own, which nobody else can name
    "sendto": (4, (0,)),  # to the other end, and to no address
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, locks, F_DUPFD_CLOEXEC, F_GETPIPE_SZ: no F_SETOWN, no F_SETSIG
    "fcntl": (1, (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)),
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: no FIOASYNC, no FIOSETOWN, no terminal of others
    "ioctl": (1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
}
# Per machine the audit architecture, and the numbers of what is allowed (asm/unistd_64.h, asm-generic/unistd.h).
_MACHINES = {
    "x86_64": (0xC000003E, """
        read=0 write=1 open=2 close=3 stat=4 fstat=5 lstat=6 poll=7 lseek=8 mmap=9 mprotect=10 munmap=11 brk=12
        rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15 ioctl=16 pread64=17 pwrite64=18 readv=19 writev=20
        access=21 pipe=22 select=23 sched_yield=24 mremap=25 msync=26 mincore=27 madvise=28 dup=32 dup2=33
        pause=34 nanosleep=35 getitimer=36 alarm=37 setitimer=38 getpid=39 sendfile=40 sendto=44 recvfrom=45
        recvmsg=47 shutdown=48 getsockname=51 getpeername=52 socketpair=53 getsockopt=55 clone=56 fork=57
        vfork=58 execve=59 exit=60 wait4=61 kill=62 uname=63 fcntl=72 flock=73 fsync=74 fdatasync=75 truncate=76
        ftruncate=77 getdents=78 getcwd=79 chdir=80 fchdir=81 rename=82 mkdir=83 rmdir=84 creat=85 link=86
        unlink=87 symlink=88 readlink=89 chmod=90 fchmod=91 chown=92 fchown=93 lchown=94 umask=95
        gettimeofday=96 getrlimit=97 getrusage=98 sysinfo=99 times=100 getuid=102 getgid=104 geteuid=107
        getegid=108 setpgid=109 getppid=110 getpgrp=111 setsid=112 getgroups=115 getresuid=118 getresgid=120
        getpgid=121 getsid=124 rt_sigpending=127 rt_sigtimedwait=128 rt_sigsuspend=130 sigaltstack=131 utime=132
        statfs=137 fstatfs=138 getpriority=140 sched_getparam=143 sched_getscheduler=145
        sched_get_priority_max=146 sched_get_priority_min=147 sched_rr_get_interval=148 prctl=157 arch_prctl=158
        setrlimit=160 gettid=186 readahead=187 getxattr=191 lgetxattr=192 fgetxattr=193 listxattr=194
        llistxattr=195 flistxattr=196 tkill=200 time=201 futex=202 sched_setaffinity=203 sched_getaffinity=204
        epoll_create=213 getdents64=217 set_tid_address=218 restart_syscall=219 fadvise64=221 timer_create=222
        timer_settime=223 timer_gettime=224 timer_getoverrun=225 timer_delete=226 clock_gettime=228
        clock_getres=229 clock_nanosleep=230 exit_group=231 epoll_wait=232 epoll_ctl=233 tgkill=234 utimes=235
        waitid=247 openat=257 mkdirat=258 fchownat=260 futimesat=261 newfstatat=262 unlinkat=263 renameat=264
        linkat=265 symlinkat=266 readlinkat=267 fchmodat=268 faccessat=269 pselect6=270 ppoll=271
        set_robust_list=273 get_robust_list=274 splice=275 tee=276 sync_file_range=277 utimensat=280
        epoll_pwait=281 signalfd=282 timerfd_create=283 eventfd=284 fallocate=285 timerfd_settime=286
        timerfd_gettime=287 signalfd4=289 eventfd2=290 epoll_create1=291 dup3=292 pipe2=293 preadv=295
        pwritev=296 prlimit64=302 getcpu=309 renameat2=316 getrandom=318 execveat=322 membarrier=324
        copy_file_range=326 preadv2=327 pwritev2=328 statx=332 rseq=334 clone3=435 close_range=436
        faccessat2=439 epoll_pwait2=441 fchmodat2=452
        """),
    "aarch64": (0xC00000B7, """
        getxattr=8 lgetxattr=9 fgetxattr=10 listxattr=11 llistxattr=12 flistxattr=13 getcwd=17 eventfd2=19
        epoll_create1=20 epoll_ctl=21 epoll_pwait=22 dup=23 dup3=24 fcntl=25 ioctl=29 flock=32 mkdirat=34
        unlinkat=35 symlinkat=36 linkat=37 renameat=38 statfs=43 fstatfs=44 truncate=45 ftruncate=46
        fallocate=47 faccessat=48 chdir=49 fchdir=50 fchmod=52 fchmodat=53 fchownat=54 fchown=55 openat=56
        close=57 pipe2=59 getdents64=61 lseek=62 read=63 write=64 readv=65 writev=66 pread64=67 pwrite64=68
        preadv=69 pwritev=70 sendfile=71 pselect6=72 ppoll=73 signalfd4=74 splice=76 tee=77 readlinkat=78
        fstatat=79 fstat=80 fsync=82 fdatasync=83 sync_file_range=84 timerfd_create=85 timerfd_settime=86
        timerfd_gettime=87 utimensat=88 exit=93 exit_group=94 waitid=95 set_tid_address=96 futex=98
        set_robust_list=99 get_robust_list=100 nanosleep=101 getitimer=102 setitimer=103 timer_create=107
        timer_gettime=108 timer_getoverrun=109 timer_settime=110 timer_delete=111 clock_gettime=113
        clock_getres=114 clock_nanosleep=115 sched_getscheduler=120 sched_getparam=121 sched_setaffinity=122
        sched_getaffinity=123 sched_yield=124 sched_get_priority_max=125 sched_get_priority_min=126
        sched_rr_get_interval=127 restart_syscall=128 kill=129 tkill=130 tgkill=131 sigaltstack=132
        rt_sigsuspend=133 rt_sigaction=134 rt_sigprocmask=135 rt_sigpending=136 rt_sigtimedwait=137
        rt_sigreturn=139 getpriority=141 getresuid=148 getresgid=150 times=153 setpgid=154 getpgid=155
        getsid=156 setsid=157 getgroups=158 uname=160 getrlimit=163 setrlimit=164 getrusage=165 umask=166
        prctl=167 getcpu=168 gettimeofday=169 getpid=172 getppid=173 getuid=174 geteuid=175 getgid=176
        getegid=177 gettid=178 sysinfo=179 socketpair=199 getsockname=204 getpeername=205 sendto=206
        recvfrom=207 getsockopt=209 shutdown=210 recvmsg=212 readahead=213 brk=214 munmap=215 mremap=216
        clone=220 execve=221 mmap=222 fadvise64=223 mprotect=226 msync=227 mincore=232 madvise=233 wait4=260
        prlimit64=261 renameat2=276 getrandom=278 execveat=281 membarrier=283 copy_file_range=285 preadv2=286
        pwritev2=287 statx=291 rseq=293 clone3=435 close_range=436 faccessat2=439 epoll_pwait2=441 fchmodat2=452
        """),
}  # fmt: skip
_X32 = 0x40000000
# CLONE_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET, and CLONE_PARENT
_FORBIDDEN_CLONES = 0x7E028000
_LAST = 436  # beyond it are calls that an older kernel does not have
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _FAIL, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16

# Code, lines to skip if true, lines to skip if false, operand; an operand of None is the program's own process id.
Instruction = tuple[int, int, int, int | None]


def syscall_filter(machine: str, *, attributes: bool = True) -> list[Instruction] | None:
    """The filter in classic BPF for a machine as `os.uname` names it; None for one whose system calls are not known.

    attributes: whether modes, owners and times of files may be changed, which nothing else keeps a program from that
        runs
        as the user it belongs to.
    """
    if machine not in _MACHINES or sys.maxsize < 1 << 32:
        return None
    architecture, table = _MACHINES[machine]
    numbers = {name: int(number) for name, _, number in (entry.partition("=") for entry in table.split())}
    refuse: Instruction = (_RETURN, 0, 0, _FAIL | errno.EPERM)
    unknown: Instruction = (_RETURN, 0, 0, _FAIL | errno.ENOSYS)
    allow: Instruction = (_RETURN, 0, 0, _ALLOW)
    lines: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        refuse,
    ]
    for name in ("clone", "clone3", "tkill", *_BY_ARGUMENT):
        number = numbers.pop(name)
        if name == "clone3":  # its flags cannot be read here; without it the C library uses clone
            body = [unknown]
        elif name == "tkill":  # threads of other processes have numbers, too
            body = [refuse]
        elif name == "clone":
            body = [(_LOAD, 0, 0, _FIRST_ARGUMENT), (_ANY_BIT, 0, 1, _FORBIDDEN_CLONES), refuse, allow]
        else:
            body = _one_of(*_BY_ARGUMENT[name], refuse, allow)
        lines += [(_EQUAL, 0, len(body), number), *body]
    allowed = sorted(number for name, number in numbers.items() if attributes or name not in _ATTRIBUTES)
    for first, last in _ranges(allowed):
        below = unknown if first > _LAST else refuse
        lines += [(_AT_LEAST, 1, 0, first), below, (_AT_LEAST, 1, 0, last + 1), allow]
    return [*lines, unknown]


def _one_of(place: int, values: tuple[int | None, ...], refuse: Instruction, allow: Instruction) -> list[Instruction]:
    """Allow a call whose argument is one of the values."""
    lines: list[Instruction] = []
    if place == 4:  # an address: all of it counts
        lines += [(_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * place + 4), (_EQUAL, 1, 0, 0), refuse]
    lines.append((_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * place))
    lines += [(_EQUAL, len(values) - position, 0, value) for position, value in enumerate(values)]
    return [*lines, refuse, allow]


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """First and last of each run of successive numbers."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
