"""What every test is held to: it leaves no process, descriptor, signal handler or temporary file behind."""

import gc
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sqspipes_mp.brokers.sqs import SQS
from tests.gates import Gate, Log, children, close_gates
from tests.moto_server import HARMLESS, moto_server

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
    """SQS at moto, with the waits of the real service cut short."""
    broker = SQS("us-east-1", endpoint_url=moto_url, access_key="testing", secret_key="testing")
    broker._settle = 0.2
    broker._purge_window = 0.0
    return broker


@pytest.fixture(scope="session")
def helpers_of_multiprocessing() -> None:
    """Start forkserver and resource tracker, which stay until the interpreter ends."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["sqspipes_mp.children"])
    multiprocessing.forkserver.ensure_running()
    multiprocessing.resource_tracker.ensure_running()


@pytest.fixture(autouse=True)
def harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make AWS unreachable."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "SQSPIPES_"))]:
        if name != "SQSPIPES_TEST_ENDPOINTS":
            monkeypatch.delenv(name)
    for name, value in HARMLESS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def nothing_left_behind(own_temporary_folder: Path) -> Iterator[None]:
    alone = not _direct_children()
    before_children = set() if alone else {process.pid for process in children()}
    before_helpers = set() if alone else _helpers()
    before_fds = _descriptors()
    before_handlers = {number: signal.getsignal(number) for number in _HANDLERS}
    yield
    close_gates()

    def left() -> tuple[list[psutil.Process], dict[int, str]]:
        # Looking at all processes of the machine takes its time: only where this one has children at all.
        now_alone = not _direct_children()
        processes = [] if now_alone else [process for process in children() if process.pid not in before_children]
        # A helper that was started for the whole session has its pipes, too.
        after = _descriptors() if (set() if now_alone else _helpers()) == before_helpers else {}
        return processes, {fd: what for fd, what in after.items() if fd not in before_fds}

    processes, fds = left()
    if processes or fds:
        # What only waits for the garbage collector is not leaked. (Collecting after every test takes minutes in all.)
        gc.collect()
        processes, fds = left()
    for process in processes:
        process.kill()
    assert not processes, "processes left behind"
    assert {number: signal.getsignal(number) for number in _HANDLERS} == before_handlers
    assert signal.set_wakeup_fd(-1) == -1
    assert not list(own_temporary_folder.glob("sqspipes*"))
    assert fds == {}


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # That of the listing itself.
    return found


def _direct_children() -> str:
    """Return the pids of this process's children as the kernel lists them."""
    return "".join(path.read_text() for path in Path("/proc/self/task").glob("*/children"))


def _helpers() -> set[int]:
    ours = {process.pid for process in children()}
    return {process.pid for process in psutil.Process().children(recursive=True)} - ours


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
