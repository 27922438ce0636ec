"""Closes a process that is about to read untrusted text: no files, no sockets, no processes, no new code.

Three layers, each enough on its own for what it covers:

* limits of the kernel: no new descriptor, no byte to a file, no core dump, no child (the last not for root);
* the interpreter's audit hook: everything that it announces is refused (opening, importing, compiling or executing
  source text, ctypes, signals, …) but for a short list of harmless looks;
* a filter of system calls, where kernel and processor are known: all but memory, time, locks, reading and writing
  what is open already.

None of it can be taken back by the process. What is needed must be imported and warm before.
"""

import ctypes
import platform
import resource
import struct
import sys

_HARMLESS = frozenset(
    {
        "builtins.id",
        "object.__getattr__",
        "array.__new__",
        "sys._getframe",
        "sys._current_frames",
        "gc.get_objects",
        "gc.get_referrers",
        "gc.get_referents",
        "time.sleep",
        "resource.setrlimit",
        "sys.unraisablehook",
        "sys.excepthook",
        "cpython.PyInterpreterState_Clear",
        "cpython._PySys_ClearAuditHooks",
    }
)
# The AUDIT_ARCH of a processor, the number of seccomp(2), and the numbers of what stays allowed: read, write, close,
# poll, ppoll, mmap, mprotect, munmap, brk, mremap, madvise, rt_sigaction, rt_sigprocmask, rt_sigreturn, sigaltstack,
# sched_yield, nanosleep, clock_nanosleep, clock_gettime, gettimeofday, getpid, getppid, gettid, getrusage, sysinfo,
# getrlimit, setrlimit, futex, restart_syscall, getrandom, membarrier, rseq, sched_getaffinity, exit, exit_group
# (aarch64 has no poll). Last the number of prlimit64, which is allowed on the process itself.
_CALLS = {
    "x86_64": (
        0xC000003E,
        317,
        (
            *(0, 1, 3, 7, 271, 9, 10, 11, 12, 25, 28, 13, 14, 15, 131, 24, 35, 230, 228, 96, 39, 110, 186, 98, 99),
            *(97, 160, 202, 219, 318, 324, 334, 204, 60, 231),
        ),
        302,
    ),
    "aarch64": (
        0xC00000B7,
        277,
        (
            *(63, 64, 57, 73, 222, 226, 215, 214, 216, 233, 134, 135, 139, 132, 124, 101, 115, 113, 169, 172, 173),
            *(178, 165, 179, 163, 164, 98, 128, 278, 283, 293, 123, 93, 94),
        ),
        261,
    ),
}
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC = 1, 1
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF, on 32-bit words
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # go on; fail with EPERM


class Forbidden(BaseException):
    """What the seal raises. No ``Exception``, so that no library's handler goes on after it."""


class Seal:
    """The seal of this process; :attr:`broken` names what was tried since the last :meth:`reset`."""

    def __init__(self) -> None:
        self.broken: list[str] = []
        filter_system_calls()  # ctypes may open files, so the limits come after
        lower_limits()
        sys.addaudithook(self._hook)

    def reset(self) -> None:
        """Forgets what was tried."""
        self.broken.clear()

    def _hook(self, event: str, args: tuple[object, ...]) -> None:
        if event not in _HARMLESS:
            self.broken.append(event)
            raise Forbidden(event)


def lower_limits() -> None:
    """No new descriptor, no byte to a file, no core dump, no child."""
    limit(resource.RLIMIT_NOFILE, 1)  # poll(2) of one descriptor needs 1; number 0 is taken
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_NPROC, 0)


def limit(which: int, soft: int, hard: int | None = None) -> None:
    """Lowers a limit of this process; ``hard`` None sets both. Never above the hard limit that is in force."""
    ceiling = resource.getrlimit(which)[1]
    hard = soft if hard is None else hard
    if ceiling != resource.RLIM_INFINITY:
        soft = min(soft, ceiling)
        hard = ceiling if hard == resource.RLIM_INFINITY else min(hard, ceiling)
    resource.setrlimit(which, (soft, hard))


def filter_system_calls() -> bool:
    """Refuses all but a few system calls to every thread, for good. False where kernel or processor cannot do it."""
    if sys.platform != "linux" or platform.machine() not in _CALLS or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    arch, seccomp, allowed, prlimit = _CALLS[platform.machine()]
    code = _program(arch, allowed, prlimit)
    held = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: the number of instructions (padded to a pointer) and where they are
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(held)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    done = libc.syscall(seccomp, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, program)
    return bool(done == 0)


def _program(arch: int, allowed: tuple[int, ...], prlimit: int) -> bytes:
    """BPF: the processor's calls in ``allowed`` go on, ``prlimit`` for process 0 (itself) too, all else is refused."""
    count = len(allowed)
    rules = [(_LOAD, 0, 0, 4), (_JUMP_IF_EQUAL, 0, count + 4, arch), (_LOAD, 0, 0, 0)]
    rules += [(_JUMP_IF_EQUAL, 0, 2, prlimit), (_LOAD, 0, 0, 16), (_JUMP_IF_EQUAL, count + 1, count, 0)]
    rules += [(_JUMP_IF_EQUAL, count - i, 0, number) for i, number in enumerate(allowed)]
    rules += [(_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("HBBI", *rule) for rule in rules)
