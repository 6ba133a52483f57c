"""The main thread of a source's worker: it calls the function again and again, or walks its generator (worker)."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from typing import Any

from sqspipes_mp.brokers.base import Completion
from sqspipes_mp.ipc.channel import EXIT_TASK, Kind
from sqspipes_mp.ipc.report.exception_text import line_of
from sqspipes_mp.ipc.statistics import FAILED, FAILED_LATE, FINISHED, INCARNATION, OUTPUTS_DROPPED
from sqspipes_mp.messages.attempts import backoff
from sqspipes_mp.messages.ids import source_parent
from sqspipes_mp.pipeline.outputs import DROPPED, Product
from sqspipes_mp.worker.run.function import Late
from sqspipes_mp.worker.run.parts import Parts
from sqspipes_mp.worker.run.rest import Rest
from sqspipes_mp.worker.send.accepted_calls import SPAN
from sqspipes_mp.worker.send.outgoing import Done
from sqspipes_mp.worker.send.policy import decide

log = logging.getLogger("sqspipes_mp.worker")

#: Longest rest of a source that has nothing to give, seconds.
_LONGEST_REST = 1.0


class Source:
    """Makes messages without an input. Its calls are numbered: a replacement goes on where this worker stopped."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._context = context = parts.context
        self._function = function = parts.function
        self._ready = parts.ready
        self._outbox = parts.outbox
        self._products = parts.products
        self._results = parts.results
        assert parts.outbox.accepted is not None
        self._accepted = parts.outbox.accepted
        most = function.task.max_waiting
        self._rest = None if most is None else Rest(context, most)
        #: Number of the next call. Those before the prefix were accepted before this worker began.
        self._number = self._accepted.prefix
        self._slot = (
            f"{context.stage.name}/{context.assignment.seat.index}" if context.assignment.seat else context.stage.name
        )
        if not function.is_generator:
            # A generator's replacement walks the same values again; each call of a function is a new one.
            self._slot += f"/{context.board.get(context.slot, INCARNATION)}"

    def run(self) -> None:
        """Call until told to stop or the generator ends."""
        context = self._context
        if context.board.get(context.slot, FINISHED):
            context.say(Kind.ENDED)
        elif self._function.is_generator:
            self._walk()
        else:
            self._repeat()
        # A source receives nothing, so the release of others' messages need not wait for it.
        context.say(Kind.STOPPED)
        self._parts.run_callbacks()
        if self._results is not None:
            self._results.wait_taken()
            self._results.take_unacknowledged()

    def _repeat(self) -> None:
        """Call the function for ever."""
        context = self._context
        rest, failures, done, idle = 0.0, 0, 0, 0.0
        most = self._function.task.max_tasks_per_worker
        while not context.no_more.wait(rest) and self._may_call():
            self._parts.run_callbacks()
            try:
                value = self._function.call()
                product = self._make(value)
            except Late as late:
                # No policy is asked: the call is dropped, as it would be with a killed worker.
                failures += 1
                context.count(FAILED, 1)
                context.count(FAILED_LATE, 1)
                rest = backoff(failures, random.uniform)
                log.warning("%s: %s; trying again in %.1f s", context.stage.name, late, rest)
                continue
            except BaseException as error:
                # SystemExit and KeyboardInterrupt of the user's code are its failures, too.
                failures += 1
                again = self._failed(error, failures)
                if again is None:
                    return
                rest = again
                continue
            failures = 0
            nothing = product.output is None and (product.value is None or product.value is DROPPED)
            idle = min(_LONGEST_REST, 2 * idle or 0.01) if nothing and not self._function.task.interval else 0.0
            rest = idle
            self._send(product)
            done += 1
            if done == most:
                context.say(Kind.RECYCLE, {"reason": "max_tasks_per_worker"})
                return

    def _walk(self) -> None:
        """Send each yield after those accepted before this worker began."""
        context = self._context
        try:
            values: Iterator[Any] = self._function.call()
            for _ in range(self._number):
                next(values)
        except StopIteration:
            pass
        except BaseException as error:
            self._end_with(error)
            return
        while not context.no_more.is_set():
            # A value that was accepted out of order, before this worker began, takes no turn.
            again = self._accepted.has(self._number)
            if not again and not self._may_call():
                return
            self._parts.run_callbacks()
            try:
                value = self._function.next_of(values)
                if again:
                    self._number += 1
                    continue
                product = self._make(value)
            except StopIteration:
                if self._results is not None:
                    self._results.wait_taken()
                self._outbox.put(Done(Completion(None), end=self._number))
                self._outbox.hurry()
                context.say(Kind.ENDED)
                return
            except Late as late:
                # A generator cannot be asked for the same value again. A successor walks it anew, and skips the
                # accepted values.
                self._outbox.wait_carried()
                log.error("%s: %s; this worker ends", context.stage.name, late)
                os._exit(EXIT_TASK)
            except BaseException as error:
                # A generator that raised is over, in every mode.
                self._end_with(error)
                return
            self._send(product)

    def _may_call(self) -> bool:
        """Wait for the next call's turn, for room, and for the end of a pause; False: the run ends first."""
        context, pause = self._context, self._parts.pause
        if not (self._function.pace(self._outbox.hurry) and self._has_room()):
            return False
        while context.paused and not context.no_more.is_set():
            pause.follow()
            with context.resting():
                self._ready.wait(lambda: not pause.paused or context.no_more.is_set())
            self._parts.run_callbacks()
        return not context.no_more.is_set()

    def _has_room(self) -> bool:
        """Wait until few enough messages wait, and the next call fits into the window of accepted ones.

        False: the run ends first.
        """
        if self._rest is not None and not self._rest.over(self._outbox.hurry):
            return False
        if self._number >= self._accepted.prefix + SPAN:
            self._outbox.hurry()
        return self._accepted.wait_for_room(self._number, self._context.no_more)

    def _make(self, value: Any) -> Product:
        parent = source_parent(self._context.board.run_id, self._slot, self._number)
        product = self._products.make(value, None, parent, 0)
        self._context.check_process()
        if self._results is not None and product.value is not DROPPED:
            self._blob = self._results.pack(product.value)
        return product

    def _send(self, product: Product) -> None:
        context = self._context
        if product.value is DROPPED or (context.stage.outputs and product.output is None):
            context.count(OUTPUTS_DROPPED, 1)
        callbacks = () if product.callback is None else (product.callback,)
        outputs = () if product.output is None else (product.output,)
        done = Done(Completion(None, outputs, again=self._function.is_generator), None, callbacks, self._number)
        ident = f"{source_parent(context.board.run_id, self._slot, self._number)}"
        self._number += 1
        if self._results is None or product.value is DROPPED:
            self._outbox.put(done)
        else:
            self._results.send(done, [(ident, self._blob)])

    def _failed(self, error: BaseException, failures: int) -> float | None:
        """Take note of a failed call; return the seconds to rest, None where the run ends with it."""
        context = self._context
        context.count(FAILED, 1)
        decision, error = decide(
            error,
            attempt=failures,
            receives=0,
            # Without a message there are no attempts to use up.
            max_attempts=failures + 1,
            on_error=context.on_error,
            group=None,
            jitter=random.uniform,
        )
        if decision.report:
            context.end_run(error)
            return None
        log.warning("%s: the source failed: %s: %s", context.stage.name, type(error).__name__, line_of(error))
        return decision.delay if decision.action == "retry" else backoff(failures, random.uniform)

    def _end_with(self, error: BaseException) -> None:
        self._context.count(FAILED, 1)
        self._context.end_run(error)
