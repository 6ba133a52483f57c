"""The bell of a file: a word in shared memory on which the receivers of all processes wait (any process).

The word is in a small file beside the database, ``FILE-bell``, which every process maps. A commit that gives receivers
a message writes a new value into it and wakes all that wait (futex(2)). A receiver reads the word, looks for messages,
and waits only while the word has not changed since, so no commit is missed. There is no watcher that could die, and any
number of receivers may wait (the system allows a user 128 inotify instances).

A process that is killed between its commit and the ring has told nobody: receivers also look every few seconds.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import platform
import sys
import time
from pathlib import Path

#: The number of the system call futex by machine; 64-bit systems only. From Linux's syscall tables.
_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "loongarch64": 98, "ppc64le": 221, "s390x": 238}
#: futex(2): FUTEX_WAIT_BITSET and FUTEX_WAKE_BITSET, on memory shared by processes.
_WAIT, _WAKE = 9, 10
#: Bit of a wake that is for all; the bits above it are for the processes.
_ALL = 1
_EVERYBODY = 0x7FFF_FFFF
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (
    ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32,
)  # fmt: skip


class _Time(ctypes.Structure):
    """struct timespec."""

    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_long))


class Bell:
    """The bell of one database ``file``. Raises ``OSError`` where the system has none, or it cannot be made."""

    def __init__(self, file: str) -> None:
        number = _FUTEX.get(platform.machine()) if sys.platform == "linux" and sys.maxsize > 1 << 32 else None
        if number is None:
            raise OSError(errno.ENOSYS, "no futex that is known here")
        self._number = number
        self._word = ctypes.c_uint32.from_buffer(_mapped(file))
        self._own = 2 << os.getpid() % 31

    @property
    def word(self) -> int:
        """The word's value."""
        return self._word.value

    def ring(self) -> None:
        """Wake all that wait, in every process."""
        self._wake(_ALL)

    def wake_own(self) -> None:
        """Wake all that wait in this process, and few others: those whose pid is the same modulo 31."""
        self._wake(self._own)

    def wait(self, word: int, seconds: float) -> None:
        """Wait for a wake, for ``seconds`` at most; return at once where the word's value is no longer ``word``.

        It may return early, as for a signal.
        """
        # An absolute time of CLOCK_MONOTONIC.
        whole, part = divmod(time.monotonic() + min(seconds, 1e9), 1)
        until = _Time(int(whole), int(part * 1e9))
        self._call(_WAIT, word, ctypes.byref(until), _ALL | self._own)

    def _wake(self, bits: int) -> None:
        # A time and no count: of two processes that ring at once, each writes another value.
        self._word.value = time.monotonic_ns() & 0xFFFF_FFFF
        self._call(_WAKE, _EVERYBODY, None, bits)

    def _call(self, operation: int, value: int, until: object, bits: int) -> None:
        _syscall(self._number, ctypes.byref(self._word), operation, value, until, None, bits)


def _mapped(file: str) -> mmap.mmap:
    """Map the word's file; make it where there is none, with the permissions of the database, as SQLite does."""
    fd = os.open(f"{file}-bell", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if not os.fstat(fd).st_size:
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(fd, Path(file).stat().st_mode & 0o777)
            # Written, and not only made longer: on a full disk a write to a hole in mapped memory kills the process.
            os.pwrite(fd, bytes(4), 0)
        return mmap.mmap(fd, 4)
    finally:
        os.close(fd)
