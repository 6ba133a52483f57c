"""A worker's planned replacement: after ``max_tasks_per_worker`` messages, or for lack of memory (worker)."""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
from collections.abc import Callable

from sqspipes_mp.worker.context import NO_DESCRIPTOR, WorkerContext, no_thread

log = logging.getLogger("sqspipes_mp.worker")

#: A ``max_tasks_per_worker`` from which the limit is drawn a little lower for each worker; a lower one is kept exactly.
_ROUND = 10
#: The reason of a replacement after ``max_tasks_per_worker`` messages.
MESSAGES = "max_tasks_per_worker"


class Lifetime:
    """Counts messages towards ``max_tasks_per_worker``; any of the threads that run messages may call it."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._sharing = threading.Lock()
        most = context.stage.task.max_tasks_per_worker
        context.left = None if most is None else drawn(most, random.randrange)
        #: Messages to go on with while another worker of the stage is being replaced; 0: never.
        self._more = 0 if most is None or context.threads > 1 else most // _ROUND
        #: Whether there is a limit to count towards.
        self.counts = most is not None

    def begins(self, count: int) -> None:
        """Take note that ``count`` messages begin."""
        if self._context.left is not None:
            with self._sharing:
                self._context.left -= count

    def ends(self) -> None:
        """Have this worker replaced once its last message has ended."""
        context = self._context
        if context.left is None or context.left > 0:
            return
        others = context.others() if self._more else []
        if others and not context.board.leave(context.slot, others):
            context.left = self._more
        else:
            self.recycle(MESSAGES)

    def recycle(self, reason: str, *, starved: bool = False) -> None:
        """Have this worker replaced once its running calls have ended.

        ``starved``: it has no memory to receive or decode messages, and its successor may not have any either.
        """
        self._context.recycle(reason, starved=starved)

    def failed(self, error: BaseException) -> None:
        """Have this worker replaced after a call's error that says that the process is worn out."""
        if reason := worn_out(error):
            if not isinstance(error, MemoryError):
                log.warning("%s (pid %d) is replaced: %s", self._context.stage.name, os.getpid(), reason)
            self.recycle(reason)


def worn_out(error: BaseException) -> str | None:
    """Return the reason to replace a worker one of whose calls raised ``error``; None: there is none. Pure."""
    if isinstance(error, MemoryError):
        return "MemoryError"
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return NO_DESCRIPTOR
    if no_thread(error):
        return f"its function could start no thread ({error})"
    return None


def drawn(most: int, below: Callable[[int], int]) -> int:
    """Return the number of messages after which a worker ends: up to a tenth fewer, so that not all end together.

    ``below``: ``random.randrange``. Pure but for that.
    """
    return most - below(most // _ROUND + 1)
