"""What a start does to the process that forks."""

import gc
import os
import weakref

import pytest

from sqspipes_mp.supervisor.child import sharing_pages


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
