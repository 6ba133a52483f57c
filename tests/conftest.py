"""What every test is held to: it leaves no process, descriptor, signal handler or temporary file behind."""

import contextlib
import gc
import logging
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import hypothesis
import psutil
import pytest

from sqspipes_mp.brokers.sqs import SQS
from standin import StandIn, standin
from standin.brokers import sqs_at
from tests.gates import Gate, Log, children, close_gates, eventually
from tests.moto_server import HARMLESS, moto_server

# How long an example takes is the machine's business, and a failure must be the same one at the next run.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")

# A shell's background job ignores SIGINT, and so would every program that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_HANDLERS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGCHLD,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGPIPE,
)


@pytest.fixture(scope="session", autouse=True)
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give this session a temporary folder of its own: what others leave in the machine's is not our tests' doing."""
    folder = tmp_path_factory.mktemp("t")
    old_variable, old_folder = os.environ.get("TMPDIR"), tempfile.tempdir
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    yield folder
    tempfile.tempdir = old_folder
    if old_variable is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = old_variable


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    """URL of moto's SQS."""
    SQS().warm()
    with moto_server() as url:
        yield url


@pytest.fixture(scope="session")
def moto(moto_url: str) -> SQS:
    """SQS at moto."""
    return sqs_at(moto_url)


@pytest.fixture(scope="module")
def server() -> Iterator[StandIn]:
    """The stand-in for SQS, one for all tests of a module."""
    SQS().warm()
    with standin() as server:
        yield server


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call() -> None:
    """Let runs of several tests share a forkserver: it serves one environment, and pytest's variable is each test's."""
    os.environ.pop("PYTEST_CURRENT_TEST", None)


@pytest.fixture(scope="session")
def helpers_of_multiprocessing() -> None:
    """Start forkserver and resource tracker, which stay until the interpreter ends."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["sqspipes_mp.caller.mains"])
    multiprocessing.forkserver.ensure_running()
    multiprocessing.resource_tracker.ensure_running()


@pytest.fixture(autouse=True)
def harmless(monkeypatch: pytest.MonkeyPatch, own_temporary_folder: Path) -> None:
    """Make AWS unreachable, and register engines where nobody else looks."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "SQSPIPES_"))]:
        if name != "SQSPIPES_TEST_ENDPOINTS":
            monkeypatch.delenv(name)
    for name, value in HARMLESS.items():
        monkeypatch.setenv(name, value)
    # boto3's default session keeps the profile and the files of the test that was the first to ask for a client.
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    monkeypatch.setenv("SQSPIPES_RUN_DIR", str(own_temporary_folder / "registry"))


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Take away the handlers and levels that a command line in this process has set: streams may be closed by now."""
    before = {name: (_logger(name).level, list(_logger(name).handlers)) for name in _loggers()}
    yield
    for name in _loggers():
        level, handlers = before.get(name, (logging.NOTSET, []))
        logger = _logger(name)
        logger.setLevel(level)
        for handler in list(logger.handlers):
            if handler not in handlers and not type(handler).__module__.startswith("_pytest"):
                logger.removeHandler(handler)


def _loggers() -> list[str | None]:
    return [None, *(name for name in list(logging.root.manager.loggerDict) if name.startswith("sqspipes_mp"))]


def _logger(name: str | None) -> logging.Logger:
    return logging.getLogger(name)


@pytest.fixture(autouse=True)
def nothing_left_behind(own_temporary_folder: Path) -> Iterator[None]:
    before_children, before_helpers = _processes()
    before_fds = _descriptors()
    before_handlers = {number: signal.getsignal(number) for number in _HANDLERS}
    yield
    close_gates()
    now_children, helpers = _processes()
    left = now_children - before_children
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "processes left behind"
    assert {number: signal.getsignal(number) for number in _HANDLERS} == before_handlers
    assert signal.set_wakeup_fd(-1) == -1
    # A helper that was started for the whole session has its pipes, too.
    if _new(before_fds) and helpers == before_helpers:
        # Collecting takes a while in a large process, so only where it could help.
        gc.collect()
        # A server's thread may only be about to close what its client has closed.
        eventually(lambda: not _new(before_fds), f"no descriptors left behind: {_new(before_fds)}")
    if list(own_temporary_folder.glob("sqspipes*")):
        gc.collect()
        assert not list(own_temporary_folder.glob("sqspipes*"))


def _processes() -> tuple[set[int], set[int]]:
    """Return the engine's processes below this one, and the helpers of multiprocessing and of the tests."""
    with contextlib.suppress(FileNotFoundError):
        # Looking through all processes takes long, and mostly there are none.
        if not any(path.read_text() for path in Path("/proc/self/task").glob("*/children")):
            return set(), set()
    ours = {process.pid for process in children()}
    return ours, {process.pid for process in psutil.Process().children(recursive=True)} - ours


def _new(before: dict[int, str]) -> dict[int, str]:
    return {fd: what for fd, what in _descriptors().items() if fd not in before}


def _descriptors() -> dict[int, str]:
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        try:
            found[int(path.name)] = str(path.readlink())
        except FileNotFoundError:
            continue  # That of the listing itself.
    return found


def _direct_children() -> str:
    """Return the pids of this process's children as the kernel lists them."""
    return "".join(path.read_text() for path in Path("/proc/self/task").glob("*/children"))


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """Path of an SQLite file that does not exist yet."""
    return tmp_path / "queues.db"


@pytest.fixture
def new_gate(tmp_path: Path) -> Callable[[], Gate]:
    """Make gates, closed at first."""
    made: list[Gate] = []

    def make() -> Gate:
        gate = Gate(str(tmp_path / f"gate-{len(made)}"))
        os.mkfifo(gate.path)
        made.append(gate)
        return gate

    return make


@pytest.fixture
def gate(new_gate: Callable[[], Gate]) -> Gate:
    return new_gate()


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(str(tmp_path / "log"))
