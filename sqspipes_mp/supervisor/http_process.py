"""The HTTP process as the supervisor sees it: its socket, its start, its restarts (supervisor).

It is a program of its own (``observer/``), not a fork: it has none of this process's memory, no descriptor but the
statistics and the socket, and no credentials. Its death changes nothing for the run. The supervisor keeps the socket,
so that clients wait while the process is started again.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import spawn
from pathlib import Path
from typing import IO

from sqspipes_mp.errors import ConfigError
from sqspipes_mp.host import fork_guard as forks
from sqspipes_mp.host.listening import address_of, listen
from sqspipes_mp.ipc.channel import describe_exit
from sqspipes_mp.ipc.running.health import SILENCE
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.messages.attempts import exponential
from sqspipes_mp.pipeline.http_address import HttpAddress
from sqspipes_mp.supervisor.events import Events
from sqspipes_mp.supervisor.restart import FIRST_BACKOFF, LONGEST_BACKOFF, WINDOW

log = logging.getLogger("sqspipes_mp.supervisor")

#: Most bytes that are logged of the errors of a process that died.
_MOST = 4000
#: The process ignores them from its first moment; they stay blocked across the exec.
_IGNORED = (signal.SIGINT, signal.SIGTERM)


def open_http(address: HttpAddress | None, board: Scoreboard, events: Events) -> HttpProcess | None:
    """Listen at a run's address; None: it has none.

    A port that cannot be had is a ``ConfigError``; where only the environment asked for it, a WARNING and None.
    """
    if address is None:
        return None
    try:
        sock = listen(address.host, address.port)
    except OSError as error:
        why = error.strerror or str(error)
        if not address.required:
            log.warning("%s=%s: %s; this run serves no HTTP", address.field, address.text, why)
            return None
        cure = "Stop who has it (ss -tlnp tells), or name another one"
        raise ConfigError(address.field, address.text, f"an address that is free ({why})", cure) from None
    return HttpProcess(sock, board, events)


class HttpProcess:
    """The process and its socket; every fork of this process closes its copies."""

    def __init__(self, sock: socket.socket, board: Scoreboard, events: Events) -> None:
        self._sock = sock
        self._board = board
        self._events = events
        #: The registry's folder, where orders go; empty: the run is not registered.
        self._folder = ""
        self._process: subprocess.Popen[bytes] | None = None
        #: Becomes readable at the process's death; -1: the system tells by ``poll`` alone.
        self._watch = -1
        self._errors: IO[bytes] | None = None
        self._started_at = 0.0
        #: When the next process starts, monotonic seconds.
        self._start_at = math.inf
        #: Deaths in a row, none of them after a long life.
        self._streak = 0
        forks.protect(self)

    @property
    def address(self) -> str:
        """The host and port of the URL."""
        return address_of(self._sock)

    def begin(self, folder: str) -> None:
        """Start the process; ``folder``: the registry's, empty where the run is not registered."""
        self._folder = folder
        log.info("metrics and health are at http://%s/", self.address)
        self._start(time.monotonic())

    def deadline(self) -> float:
        """Return when ``look`` is due, monotonic seconds."""
        return self._start_at

    def look(self, now: float) -> None:
        """Start a process where that is due at ``now`` (monotonic seconds), and notice a dead one."""
        if self._watch < 0 and self._process is not None and self._process.poll() is not None:
            self._died()
        if now >= self._start_at:
            self._start(now)

    def close(self) -> None:
        """End the process and close the socket."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._forget()
        self._sock.close()

    def hold(self, patience: float) -> None:
        """Do nothing before a fork."""

    def resume(self, *, child: bool) -> None:
        """Close the copies in a forked ``child``: with the socket open there the port would stay taken."""
        if child:
            if self._process is not None:
                # Not this process's child.
                self._process.returncode = 0
            self._close_files()
            self._sock.close()

    # -- the process --------------------------------------------------------------------------------------------

    def _start(self, now: float) -> None:
        self._start_at = math.inf
        self._started_at = now
        try:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (read after the process's death)
            self._process = self._popen(self._errors)
        except OSError as error:
            self._again(f"could not be started: {error}")
            return
        with contextlib.suppress(OSError, AttributeError):
            self._watch = os.pidfd_open(self._process.pid)
            self._events.connect(self._watch, self._died)

    def _popen(self, errors: IO[bytes]) -> subprocess.Popen[bytes]:
        with contextlib.ExitStack() as copies:
            try:
                statistics = self._board.open_statistics()
            except OSError:
                # A system without /proc; the process maps them read-only all the same.
                statistics = os.dup(self._board.statistics_fd)
            copies.callback(os.close, statistics)
            # Not 0, 1 or 2, which are free where the program has closed its standard streams, and are taken below.
            given = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in (statistics, self._sock.fileno())]
            for fd in given:
                copies.callback(os.close, fd)
            old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
            copies.callback(signal.pthread_sigmask, signal.SIG_SETMASK, old_mask)
            return subprocess.Popen(
                [
                    os.fsdecode(spawn.get_executable()), "-P", "-c", _program(),
                    *map(str, given), self._board.run_id, self._folder, str(SILENCE), str(os.getpid()),
                ],
                env=environment(), pass_fds=given, process_group=0,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
            )  # fmt: skip

    def _died(self) -> None:
        assert self._process is not None
        code = self._process.wait()
        self._again(f"(pid {self._process.pid}) was lost: {describe_exit(code)}{self._last_words()}")

    def _again(self, why: str) -> None:
        """Plan the next start after a process that was lost, or could not be started."""
        self._forget()
        now = time.monotonic()
        self._streak = 1 if now - self._started_at >= WINDOW else self._streak + 1
        delay = exponential(FIRST_BACKOFF, self._streak - 1, LONGEST_BACKOFF)
        self._start_at = now + delay
        log.warning("the HTTP process %s; restart in %.1f s, and the run goes on", why, delay)

    def _last_words(self) -> str:
        assert self._errors is not None
        self._errors.seek(0)
        text = self._errors.read()[-_MOST:].decode("utf-8", "replace").strip()
        return f"\n{text}" if text else ""

    def _forget(self) -> None:
        """Let go of a process that has ended."""
        self._process = None
        if self._watch >= 0:
            self._events.hang_up(self._watch)
        self._close_files()

    def _close_files(self) -> None:
        if self._watch >= 0:
            os.close(self._watch)
            self._watch = -1
        if self._errors is not None:
            self._errors.close()
            self._errors = None


def environment() -> dict[str, str]:
    """Return this process's environment without AWS's variables."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}


def _program() -> str:
    """Return the text of the process's program.

    It imports this very package, and nothing of the user's: folders that only this process has in its module path come
    after all others, so that no file of the user's is taken for a library.
    """
    root = str(Path(__file__).parents[2])
    return (
        f"import sys; sys.path.insert(0, {root!r}); import sqspipes_mp; del sys.path[0]; "
        f"sys.path += [each for each in {[each for each in sys.path if each]!r} if each not in sys.path]; "
        "from sqspipes_mp.observer.main import main; main(sys.argv[1:])"
    )
