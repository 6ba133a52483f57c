"""What a start does to the process that forks."""

import errno
import gc
import inspect
import multiprocessing
import os
import select
import sys
import weakref
from multiprocessing import parent_process, popen_fork
from pathlib import Path

import pytest

from sqspipes_mp.ipc.birth import Birth, begin
from sqspipes_mp.supervisor.child import sharing_pages, start


def test_forks_of_several_threads_leave_nothing_frozen() -> None:
    # What stays frozen is never collected again: a program that runs engines would grow for ever.
    everything_thawed()
    before = gc.get_freeze_count()
    one, other = sharing_pages(), sharing_pages()
    one.__enter__()
    other.__enter__()
    assert gc.get_freeze_count() > before
    one.__exit__(None, None, None)
    assert gc.get_freeze_count() > before
    other.__exit__(None, None, None)
    assert gc.get_freeze_count() == 0


def everything_thawed() -> None:
    """Leave nothing frozen, but for what the collector puts there itself: immortal objects, since Python 3.12."""
    gc.unfreeze()
    gc.collect()


class Ring:
    """What only the collector can free."""

    def __init__(self) -> None:
        self.me = self


@pytest.mark.parametrize("by_user", [False, True])
def test_what_existed_at_a_start_is_collected_once_it_is_garbage(by_user: bool) -> None:
    everything_thawed()
    if by_user:
        gc.freeze()
    try:
        ring = Ring()
        left = weakref.ref(ring)
        with sharing_pages():
            pass
        del ring
        gc.collect()
        assert left() is None
    finally:
        gc.unfreeze()


def test_what_the_user_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        with sharing_pages():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_a_child_forked_meanwhile_can_start_its_own() -> None:
    with sharing_pages():
        pid = os.fork()
        if not pid:
            try:
                with sharing_pages():
                    os._exit(0)
            finally:
                os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def wait_for_parent(birth: Birth) -> None:
    begin(birth)
    parent = parent_process()
    assert parent is not None
    assert parent.is_alive()
    birth.sock.recv(1)


def descriptors() -> set[str]:
    return {path.name for path in Path("/dev/fd").iterdir()}


def test_a_forked_child_is_one_of_multiprocessings_and_leaves_no_descriptor() -> None:
    before = descriptors()
    context = multiprocessing.get_context("fork")
    child = start(context, lambda birth: (wait_for_parent, (birth,)), name="child", inherited=())
    assert [(process.name, process.pid) for process in multiprocessing.active_children()] == [("child", child.pid)]
    child.channel.close()
    assert select.select([child.watch], [], [], 60)[0]
    assert child.reap() == 0
    assert descriptors() == before


def test_a_fork_that_the_kernel_refuses_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refuse)
    before = descriptors()
    with pytest.raises(BlockingIOError):
        start(multiprocessing.get_context("fork"), lambda birth: (begin, (birth,)), name="child", inherited=())
    assert descriptors() == before


def test_multiprocessing_forks_as_its_copy_here_does() -> None:
    # Where a new Python's differs, so has supervisor/child.py.
    source = inspect.getsource(popen_fork.Popen._launch)  # type: ignore[attr-defined]
    child = source.partition("if self.pid == 0:")[2].partition("else:")[0].split("\n")
    clears = ["atexit._clear()", "atexit.register(util._exit_function)"] * (sys.version_info >= (3, 13))
    runs = ["atexit._run_exitfuncs()"] * (sys.version_info >= (3, 13))
    assert [line.strip() for line in child if line.strip()] == [
        "try:", *clears, "os.close(parent_r)", "os.close(parent_w)",
        "code = process_obj._bootstrap(parent_sentinel=child_r)", "finally:", *runs, "os._exit(code)",
    ]  # fmt: skip
