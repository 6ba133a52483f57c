"""A run under a shell's job control: Ctrl-Z, ``fg``, ``stty tostop`` and the terminal's end."""

import contextlib
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.gates import eventually

#: A shell with one job: it leads a session, gives the job the terminal, tells of its stops and continues it when told.
SHELL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
job = os.fork()
if not job:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
with open(sys.argv[1], "w", buffering=1) as told:
    while True:
        _, status = os.waitpid(job, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            told.write(f"ended {os.waitstatus_to_exitcode(status)}\\n")
            sys.exit()
        told.write("stopped\\n")
        os.read(int(os.environ["GO_ON"]), 1)
        os.tcsetpgrp(0, job)
        os.killpg(job, signal.SIGCONT)
"""

PROGRAM = """
import os, sys, time
from sqspipes_mp import Engine, Task
def work(n):
    print("a word", flush=True)
    open(f"began-{n}", "w").close()
    while not os.path.exists(f"end-{n}"):
        time.sleep(0.02)
    open(f"done-{n}", "w").close()
    return n
engine = Engine([Task(work, input=True)], broker="sqlite:///jobs.db", shutdown_grace=20)
if __name__ == "__main__":
    if sys.argv[1] == "run":
        engine.put_many([1, 2])
        print(engine.run(until="drained", idle=0).stages[0].failed, "failed")
    else:
        print(list(engine.map([1, 2])))
"""


class Terminal:
    """A terminal with a shell and its one job."""

    def __init__(self, folder: Path, how: str) -> None:
        self.folder = folder
        (folder / "shell.py").write_text(SHELL)
        (folder / "jobs.py").write_text(PROGRAM)
        self.master, slave = pty.openpty()
        modes = termios.tcgetattr(slave)
        modes[3] |= termios.TOSTOP
        termios.tcsetattr(slave, termios.TCSANOW, modes)
        reads, self._go_on = os.pipe()
        self.shell = subprocess.Popen(
            [sys.executable, "shell.py", "told", "jobs.py", how],
            cwd=folder, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, pass_fds=(reads,),
            env={**os.environ, "GO_ON": str(reads)},
        )  # fmt: skip
        os.close(slave)
        os.close(reads)

    def told(self) -> list[str]:
        path = self.folder / "told"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, name: str) -> None:
        eventually((self.folder / name).exists, f"{name} is there")

    def end(self, number: int) -> None:
        (self.folder / f"end-{number}").touch()

    def go_on(self) -> None:
        os.write(self._go_on, b".")

    def states(self) -> list[str]:
        """The state of each process of the job."""
        found: list[str] = []
        for process in psutil.Process(self.shell.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(process.status())
        return found

    def close(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.shell.pid).children(recursive=True):
                process.kill()
        self.shell.kill()
        self.shell.wait()
        os.close(self._go_on)
        with contextlib.suppress(OSError):
            os.close(self.master)


@pytest.fixture
def terminal(tmp_path: Path, request: Any) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path, request.param)
    yield terminal
    terminal.close()


@pytest.mark.parametrize("terminal", ["run", "map"], indirect=True)
def test_ctrl_z_stops_the_whole_run_and_fg_has_it_go_on(terminal: Terminal) -> None:
    terminal.wait_for("began-1")
    os.write(terminal.master, b"\x1a")
    eventually(lambda: terminal.told() == ["stopped"], "the job is stopped")
    # All but the keeper, which goes on with the leases.
    eventually(
        lambda: terminal.states().count(psutil.STATUS_STOPPED) == len(terminal.states()) - 1, "so are its workers"
    )
    terminal.end(1)
    with pytest.raises(subprocess.TimeoutExpired):
        terminal.shell.wait(0.3)
    assert not (terminal.folder / "done-1").exists()
    assert not (terminal.folder / "began-2").exists()
    terminal.go_on()
    terminal.wait_for("began-2")
    terminal.end(2)
    eventually(lambda: terminal.told() == ["stopped", "ended 0"], "the job ends")
    output = os.read(terminal.master, 65536).decode()
    assert "0 failed" in output or "[1, 2]" in output


@pytest.mark.parametrize("terminal", ["run", "map"], indirect=True)
def test_the_end_of_the_terminal_drains(terminal: Terminal) -> None:
    terminal.wait_for("began-1")
    job = psutil.Process(terminal.shell.pid).children()[0]
    # The kernel sends SIGHUP to the session's leader, and at that one's end to the terminal's foreground group.
    os.close(terminal.master)
    terminal.shell.wait()
    terminal.end(1)
    eventually(lambda: not job.is_running() or job.status() == psutil.STATUS_ZOMBIE, "the job ends")
    assert (terminal.folder / "done-1").exists()
    assert not (terminal.folder / "began-2").exists()
