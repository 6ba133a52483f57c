"""Waits at boot for a queue service that is not there yet: sidecars and compose files start in any order."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from sqspipes_mp.brokers.base import TOLD_EVERY
from sqspipes_mp.errors import BrokerUnreachable

T = TypeVar("T")

log = logging.getLogger("sqspipes_mp.brokers")

#: Seconds between two tries.
_PAUSE = 1.0


def once_reachable(step: Callable[[], T], seconds: float, pause: Callable[[float], object]) -> T:
    """Run a step again and again, for ``seconds``, while its queue service is unreachable; return its result.

    ``pause`` waits for the seconds that it is given. Raises ``BrokerUnreachable`` once the time is over.
    """
    until, told_at = time.monotonic() + seconds, float("-inf")
    while True:
        try:
            return step()
        except BrokerUnreachable as error:
            now = time.monotonic()
            if now >= until:
                raise
            if now - told_at >= TOLD_EVERY:
                told_at = now
                log.warning("waiting for the queue service, for %.0f s at most: %s", until - now, error)
        pause(min(_PAUSE, until - now))
