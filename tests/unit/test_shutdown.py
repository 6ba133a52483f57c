from sqspipes_mp.supervisor.shutdown import KEEPER_GRACE, KEEPER_GRACE_NOW, POLL_GRACE, Shutdown, Step


def _steps(shutdown, now, workers=2, receiving=0, keeper=True):
    return shutdown.steps(now, workers=workers, receiving=receiving, keeper=keeper)


def test_release_waits_until_nobody_receives():
    shutdown = Shutdown(began=10.0, grace=25.0)
    assert _steps(shutdown, 10.0, receiving=1) == []
    assert _steps(shutdown, 10.1, receiving=0) == [Step.RELEASE]
    assert _steps(shutdown, 10.2, receiving=0) == []


def test_release_comes_anyway_when_a_poll_takes_too_long():
    shutdown = Shutdown(began=10.0, grace=25.0)
    assert _steps(shutdown, 10.0 + POLL_GRACE, receiving=1) == [Step.RELEASE]


def test_workers_are_killed_when_the_grace_is_over():
    shutdown = Shutdown(began=10.0, grace=25.0)
    _steps(shutdown, 10.0)
    assert shutdown.deadline() == 35.0
    assert _steps(shutdown, 35.0) == [Step.KILL_WORKERS]


def test_a_second_signal_kills_now():
    shutdown = Shutdown(began=10.0, grace=25.0)
    _steps(shutdown, 10.0)
    shutdown.hasten(11.0)
    assert _steps(shutdown, 11.0) == [Step.KILL_WORKERS]


def test_the_keeper_quits_last_and_then_it_is_over():
    shutdown = Shutdown(began=10.0, grace=25.0)
    _steps(shutdown, 10.0)
    assert _steps(shutdown, 12.0, workers=0) == [Step.QUIT_KEEPER]
    assert _steps(shutdown, 12.5, workers=0, keeper=False) == [Step.OVER]


def test_a_keeper_that_does_not_quit_is_killed():
    for hasten, grace in ((False, KEEPER_GRACE), (True, KEEPER_GRACE_NOW)):
        shutdown = Shutdown(began=10.0, grace=25.0)
        if hasten:
            shutdown.hasten(10.0)
        _steps(shutdown, 12.0, workers=0)
        assert shutdown.deadline() == 12.0 + grace
        assert _steps(shutdown, 12.0 + grace - 0.1, workers=0) == []
        assert _steps(shutdown, 12.0 + grace, workers=0) == [Step.KILL_KEEPER]


def test_no_grace_kills_at_once():
    shutdown = Shutdown(began=10.0, grace=0.0)
    assert Step.KILL_WORKERS in _steps(shutdown, 10.0, receiving=2)
