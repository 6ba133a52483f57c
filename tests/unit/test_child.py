"""What a start does to the process that forks."""

import gc
import os

from sqspipes_mp.supervisor.child import sharing_pages


def test_forks_of_several_threads_leave_nothing_frozen() -> None:
    # What stays frozen is never collected again: a program that runs engines would grow for ever.
    before = gc.get_freeze_count()
    one, other = sharing_pages(), sharing_pages()
    one.__enter__()
    other.__enter__()
    assert gc.get_freeze_count() > before
    one.__exit__(None, None, None)
    assert gc.get_freeze_count() > before
    other.__exit__(None, None, None)
    assert gc.get_freeze_count() == before


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
