"""Every error of the package, in one tree (any process).

::

    SqsPipesError
    ├── ConfigError (ValueError)        a value the user gave is wrong; found before any process starts
    ├── BrokerError                     the queue service refuses for good, and retrying will not help
    │   ├── BrokerBusy                  no answer in time, where somebody waits for it
    │   ├── BrokerUnreachable           nothing that can be used answers at the endpoint
    │   ├── QueueMissing                a queue does not exist (deleted, or create_queues=False)
    │   └── AccessDenied                credentials missing, expired or not allowed to do this
    ├── MessageError                    one message cannot be carried
    │   ├── DecodeError                 a body in a queue is not an envelope
    │   ├── OutputError (TypeError)     what a function returned cannot become JSON
    │   │   └── WrongShape              a function with batch= did not return one result per value
    │   └── MessageTooLarge (ValueError) what a function returned does not fit into a message
    ├── PutError                        put_many ended early; says what was sent
    ├── QueuesNotEmpty                  map would begin among messages that others, or an interrupted map, have left
    ├── MapRunning                      another map of the pipeline is under way (SQLite)
    ├── MapIncomplete                   map ended before every value's results had come
    │   └── UnknownResult               a result came that is none of its values'; it went back to its queue
    ├── WorkerLost                      a worker process died of something outside Python
    │   ├── TaskTimeout                 its call outlived Task(timeout=), for which it was killed if it did not return
    │   └── SupervisorLost              the supervisor process of iterate=True died
    ├── Cancelled                       an order has cancelled a call
    ├── OrderRefused                    pause, resume, scale or cancel could not be carried out
    ├── BootError                       a child process died before it was ready and could not say why
    │   ├── StartRefused                the system lets no worker start (limit of processes, memory, descriptors)
    │   └── StartFailed                 a child could not be started for a reason that does not pass
    ├── RestartLimit                    a stage's workers die faster than restarting them can help
    ├── RemoteError                     a worker's exception that cannot be rebuilt here; carries its whole text
    └── Verdict                         raised *by* a task to decide what happens to its message
        ├── Retry                       make it visible again later
        └── Reject                      dead-letter it now

All of them pickle, and carry their data as attributes.
"""

from __future__ import annotations

from typing import Any, Self

#: Why a call failed that its worker, or the supervisor, found over its timeout.
LATE = "the call outlived the task's timeout"
#: Why a call failed that had its message until others were about to get it.
HELD = "the call had its message for nearly as long as SQS lets one be in flight, 12 hours from its receive"
#: Why a call did not end that an order has cancelled.
CANCELLED = "the call was cancelled on demand (sqspipes-mp cancel, engine.cancel)"
#: What a program needs whose children are fresh processes.
GUARD = 'With spawn and forkserver a child imports the program again: start the engine under if __name__ == "__main__":'


class ChildNote(str):  # noqa: SLOT000  (str has no slots for fields)
    """A note on an exception that a child process raised: in which stage or process, with which message."""

    #: Whether the child was not ready yet.
    booting: bool
    #: Whether it was raised with a message.
    held: bool

    def __new__(cls, text: str, *, booting: bool = False, held: bool = False) -> Self:
        """Make the note; its text is for people."""
        note = super().__new__(cls, text)
        note.booting, note.held = booting, held
        return note


class LeftNote(str):
    """A note on the exception of a run whose source, run again, makes everything once more."""

    __slots__ = ()


class SqsPipesError(Exception):
    """Base of everything this package raises on its own account."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The constructors have their own signatures, so args alone cannot rebuild the object.
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(cls: type[SqsPipesError], args: tuple[Any, ...], state: dict[str, Any]) -> SqsPipesError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(SqsPipesError, ValueError):
    """Say that a value the user gave is wrong: which field, the value, what is allowed, and the cure."""

    def __init__(self, field: str, value: object, allowed: str, cure: str = "") -> None:
        self.field = field
        self.value = repr(value)[:200]
        self.allowed = allowed
        self.cure = cure
        text = f"{field} must be {allowed}, got {self.value}"
        super().__init__(f"{text}. {cure}" if cure else text)


class BrokerError(SqsPipesError):
    """The queue service refuses for good: the text says what was refused and what to do."""


class BrokerBusy(BrokerError):
    """No answer in time; only connections with ``patience``, or attended, raise it. Trying again is right."""


class BrokerUnreachable(BrokerError):
    """Nothing that can be used answers at the endpoint: it is wrong, or the service is not there (yet)."""


class QueueMissing(BrokerError):
    """A queue does not exist: it was deleted, or never created and ``create_queues=False``."""

    def __init__(self, queue: str, cure: str) -> None:
        self.queue = queue
        super().__init__(f"queue {queue!r} does not exist. {cure}")


class AccessDenied(BrokerError):
    """Credentials are missing, expired, or do not allow the call."""


class MessageError(SqsPipesError):
    """One message cannot be carried."""


class DecodeError(MessageError):
    """A body found in a queue is not an envelope; ``body`` is kept as it was."""

    def __init__(self, reason: str, body: str) -> None:
        self.reason = reason
        self.body = body
        super().__init__(f"{reason}: {body[:200]!r}")


class OutputError(MessageError, TypeError):
    """What a function returned cannot become JSON."""


class WrongShape(OutputError):
    """A function with ``batch`` did not return one result per value."""


class MessageTooLarge(MessageError, ValueError):
    """What a function returned does not fit into a message."""


class PutError(SqsPipesError):
    """``put_many`` ended early; the cause is the error of the value or of the broker.

    ``sent``: values from the beginning that were sent for certain, ``new``: those of them that were no duplicates,
    ``doubtful``: values after these of which some may have been sent (0 where the batch was refused before sending).
    """

    def __init__(self, sent: int, new: int, doubtful: int, reason: str) -> None:
        self.sent = sent
        self.new = new
        self.doubtful = doubtful
        self.reason = reason
        rest = "nothing after them was"
        if doubtful:
            rest = f"of the next {doubtful:,} some may have been, nothing after those was"
        super().__init__(f"the first {sent:,} values were sent, {rest}: {reason}")


class QueuesNotEmpty(SqsPipesError):
    """``map`` was to begin while messages were in the pipeline's queues; ``count``: how many; ``cure``: what to do."""

    def __init__(self, domain: str, count: int, cure: str) -> None:
        self.domain = domain
        self.count = count
        self.cure = cure
        messages = "messages are" if count > 1 else "message is"
        super().__init__(
            f"{count:,} {messages} still in the queues of {domain!r}, and map could not tell their results from its "
            f"own. {cure}"
        )


class MapIncomplete(SqsPipesError):
    """``map`` ended before every value's results had come; ``missing``: values that had been fed and were not done."""

    def __init__(self, missing: int, cause: str) -> None:
        self.missing = missing
        self.cause = cause
        super().__init__(f"map ended while the results of {missing:,} values were still to come: {cause}")


class UnknownResult(MapIncomplete):
    """A result came of the message ``id``, which ``map`` had neither fed nor handed out: it is never acknowledged."""

    def __init__(self, ident: str, missing: int, cure: str) -> None:
        self.id = ident
        cause = (
            f"a result of the message {ident} came, which this map neither fed nor handed out before. Its message goes "
            f"back to its queue: nothing of it is lost. Was there another map of this pipeline, a put() or a `dead "
            f"redrive` meanwhile? {cure}"
        )
        super().__init__(missing, cause)


class ResultsNotKept(SqsPipesError):
    """``map(keep_results=True)`` came to values that were done, or sent, without it; ``count``: how many there are."""

    def __init__(self, domain: str, count: int, state: str, cure: str) -> None:
        self.domain = domain
        self.count = count
        values = "values" if count > 1 else "value"
        if count == 1:
            state = {"are under way": "is under way", "were done": "was done"}.get(state, state)
        super().__init__(
            f"{count:,} {values} of {domain!r} {state} without keep_results=True, so map cannot hand out their "
            f"results. {cure}"
        )


class MapRunning(SqsPipesError):
    """``what`` (map, purge, delete) was to begin while a map of the pipeline was under way; ``holder``: whose.

    What ``holder`` says is for people: the lock on the file ``lock`` is what counts, and it goes with its processes.
    """

    def __init__(self, domain: str, what: str, holder: str, lock: str) -> None:
        self.domain = domain
        self.what = what
        self.holder = holder
        self.lock = lock
        whose = holder or "a process that has not said which (a map that just begins or ends, a purge or a delete)"
        danger = "it would take the other's results" if what == "map" else "it would remove messages under that map"
        super().__init__(
            f"{what}() of {domain!r} must be alone with the pipeline's queues ({danger}), and {lock} is held by "
            f"{whose}. Wait until that ends, or stop it: `sqspipes-mp stop {domain}`, or SIGTERM to its process"
        )


class WorkerLost(SqsPipesError):
    """A worker process died of something outside Python (signal, ``os._exit``)."""

    def __init__(self, stage: str, pid: int, cause: str) -> None:
        self.stage = stage
        self.pid = pid
        self.cause = cause
        super().__init__(f"worker {pid} of stage {stage!r} was lost: {cause}")


class TaskTimeout(WorkerLost):
    """A call outlived ``Task(timeout=)``: its worker was killed, or the call came back late and does not count."""

    def __init__(self, stage: str, pid: int, cause: str) -> None:
        super().__init__(stage, pid, cause)
        self.args = (f"stage {stage!r}, worker {pid}: {cause}",)


class Cancelled(SqsPipesError):
    """An order (``engine.cancel``, ``sqspipes-mp cancel``) has cancelled a call: its message is dead-lettered."""

    def __init__(self, stage: str, pid: int, cause: str = CANCELLED) -> None:
        self.stage = stage
        self.pid = pid
        self.cause = cause
        super().__init__(f"stage {stage!r}, worker {pid}: {cause}")


class OrderRefused(SqsPipesError):
    """``pause``, ``resume``, ``scale`` or ``cancel`` could not be carried out; the text says why."""


class SupervisorLost(WorkerLost):
    """The supervisor process behind ``iterate=True`` and ``map`` died; its workers died with it."""

    def __init__(self, stage: str, pid: int, cause: str) -> None:
        super().__init__(stage, pid, cause)
        self.args = (f"the supervisor (pid {pid}) was lost, and its workers with it: {cause}",)


class BootError(SqsPipesError):
    """A child process died before it was ready and could not say why. ``forked``: it was forked, not started anew."""

    def __init__(self, role: str, pid: int, cause: str, *, forked: bool = False) -> None:
        self.role = role
        self.pid = pid
        self.cause = cause
        # A forked child has imported nothing: neither an import nor a missing guard can be the cause.
        imports, guard = ("", "") if forked else ("at import, ", f". {GUARD}")
        super().__init__(
            f"{role} (pid {pid}) died before it was ready: {cause}. "
            f"Look at what runs {imports}in setup and in init, and at the memory limit{guard}"
        )


class StartRefused(BootError):
    """The system let no worker start for ``seconds``: a limit of processes, memory or descriptors is reached."""

    def __init__(self, role: str, seconds: float, cause: str) -> None:
        self.role = role
        self.pid = 0
        self.seconds = seconds
        self.cause = cause
        SqsPipesError.__init__(
            self,
            f"{role} could not be started for {seconds:.0f} s, and no worker runs: {cause}. Raise the limit of "
            "processes (ulimit -u, the container's pids limit), of open files (ulimit -n) or of memory, or run fewer "
            "workers",
        )


class StartFailed(BootError):
    """A process could not be started for a reason that does not pass by itself."""

    def __init__(self, role: str, cause: str) -> None:
        self.role = role
        self.pid = 0
        self.cause = cause
        SqsPipesError.__init__(self, f"{role} could not be started: {cause}")


class RestartLimit(SqsPipesError):
    """A stage's workers died too often without completing anything: restarting does not help."""

    def __init__(self, stage: str, deaths: int, seconds: float, last: str) -> None:
        self.stage = stage
        self.deaths = deaths
        self.seconds = seconds
        self.last = last
        super().__init__(
            f"stage {stage!r}: {deaths} workers died within {seconds:g} s without completing a message; "
            f"the last one: {last}. Run the function alone (engine.call(value)) to see why"
        )


class RemoteError(SqsPipesError):
    """A worker's exception that cannot be rebuilt safely in this process.

    Its ``str()`` is ``"{type_name}: {message}"``; a printed traceback shows ``text``, too, as a note.
    """

    def __init__(self, type_name: str, message: str, text: str) -> None:
        #: Name of the exception's type.
        self.type_name = type_name
        #: The exception's own ``str()``.
        self.message = message
        #: The whole formatted traceback of the worker.
        self.text = text
        super().__init__(f"{type_name}: {message}")
        if text:
            self.add_note(f"In the worker:\n{text}")


class Verdict(SqsPipesError):
    """Raised by a task to decide what happens to the message it was given."""


class Retry(Verdict):
    """Make the message visible again after ``delay`` seconds (None: the usual backoff); counts an attempt.

    ``delay``: 0 to 43,200 s, SQS's longest visibility timeout (Amazon SQS API Reference, ChangeMessageVisibility).
    ``charge=False``: no attempt is counted, so it may come again for ever (a rate limit, a service that is down).
    ``raise Retry(5) from error`` shows the error in logs and dead letters.
    """

    def __init__(self, delay: float | None = None, *, charge: bool = True) -> None:
        bad = isinstance(delay, bool) or not isinstance(delay, (int, float, type(None)))
        if bad or (delay is not None and not 0 <= delay <= 43_200):
            raise ConfigError("Retry(delay)", delay, "None or seconds between 0 and 43200 (12 hours)")
        if not isinstance(charge, bool):
            raise ConfigError("Retry(charge)", charge, "True or False")
        self.delay = delay
        self.charge = charge
        super().__init__("retry with the usual backoff" if delay is None else f"retry in {delay:g} s")


class Reject(Verdict):
    """Dead-letter the message now, with ``reason``."""

    def __init__(self, reason: str = "rejected by the task") -> None:
        self.reason = str(reason)
        super().__init__(self.reason)
