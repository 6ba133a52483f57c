"""``/metrics``: the statistics of engines as OpenMetrics (the HTTP process).

``METRICS`` is the whole list of names, which are fixed. Labels are the domain, the stage and those named there, never
an id or a pid. Counters live in the statistics, so they outlive workers; ``Totals`` keeps them from going back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)

from sqspipes_mp.ipc.histogram import BUCKETS
from sqspipes_mp.ipc.statistics import (
    BUSY_NS,
    EMPTY_RECEIVES,
    ERROR_KINDS,
    OPERATIONS,
    QUEUE_STATES,
    QUEUE_WAIT_NS,
    QUEUE_WAITS,
    RUN_TIMES,
    STAGE,
    SlotField,
    Statistics,
)
from sqspipes_mp.observer.looked import Looked

#: The series of a metric: its name and the values of its labels.
Key = tuple[str, tuple[str, ...]]
Sample = tuple[Key, float]


@dataclass(frozen=True, slots=True)
class Described:
    """A metric as its readers know it."""

    #: With the suffix that it has in the text.
    name: str
    #: "counter", "gauge", "histogram" or "info".
    kind: str
    help: str
    labels: tuple[str, ...]
    #: Makes one value of those of several engines with the same labels.
    merge: Callable[[Iterable[float]], float] = sum


_STAGE = ("domain", "stage")
_DOMAIN = ("domain",)
_COUNTED = "Each machine exports the same count, so use max by (domain, stage), not sum."

METRICS = (
    Described(
        "sqspipes_messages_total", "counter", "Messages by outcome; each delivery has one.", (*_STAGE, "outcome")
    ),
    Described("sqspipes_call_failures_total", "counter", "Calls that failed.", (*_STAGE, "reason")),
    Described("sqspipes_outputs_total", "counter", "Outputs accepted downstream, or dropped.", (*_STAGE, "outcome")),
    Described("sqspipes_call_duration_seconds", "histogram", "Time of one call of the function.", _STAGE),
    Described(
        "sqspipes_queue_wait_seconds",
        "histogram",
        "Time from a message's send, its delay apart, to the start of its first call.",
        _STAGE,
    ),
    Described("sqspipes_busy_seconds_total", "counter", "Time in the function, of calls that have ended.", _STAGE),
    Described("sqspipes_cpu_seconds_total", "counter", "CPU time of the workers and their ended children.", _STAGE),
    Described("sqspipes_workers", "gauge", "Workers by state.", (*_STAGE, "state")),
    Described("sqspipes_workers_wanted", "gauge", "Workers that the stage should have.", _STAGE),
    Described("sqspipes_paused", "gauge", "1 while the stage is paused.", _STAGE, max),
    Described("sqspipes_running_calls", "gauge", "Calls that run now.", _STAGE),
    Described(
        "sqspipes_oldest_call_start_timestamp_seconds",
        "gauge",
        "When the oldest of the running calls began; absent while none runs.",
        _STAGE,
        min,
    ),
    Described(
        "sqspipes_queue_messages",
        "gauge",
        f"Messages in the stage's input queues, counted while somebody looks. {_COUNTED}",
        (*_STAGE, "priority", "state"),
        max,
    ),
    Described(
        "sqspipes_dead_letters",
        "gauge",
        f"Messages in the stage's dead-letter queue, counted while somebody looks. {_COUNTED}",
        _STAGE,
        max,
    ),
    Described("sqspipes_worker_restarts_total", "counter", "Workers started anew.", (*_STAGE, "reason")),
    Described("sqspipes_worker_memory_bytes", "gauge", "Private memory of all workers.", _STAGE),
    Described("sqspipes_worker_memory_max_bytes", "gauge", "Private memory of the largest worker.", _STAGE, max),
    Described("sqspipes_leases_lost_total", "counter", "Messages whose lease was lost while held.", _STAGE),
    Described("sqspipes_empty_receives_total", "counter", "Receives that brought no message.", _STAGE),
    Described(
        "sqspipes_last_receive_timestamp_seconds", "gauge", "When a receive last brought a message.", _STAGE, max
    ),
    Described("sqspipes_broker_requests_total", "counter", "Requests to the queue service.", (*_DOMAIN, "operation")),
    Described("sqspipes_broker_errors_total", "counter", "Failed requests.", (*_DOMAIN, "operation", "kind")),
    Described("sqspipes_keeper_last_beat_timestamp_seconds", "gauge", "When the keeper last moved.", _DOMAIN, min),
    Described(
        "sqspipes_supervisor_last_beat_timestamp_seconds", "gauge", "When the supervisor last moved.", _DOMAIN, min
    ),
    Described("sqspipes_build_info", "info", "Versions.", (*_DOMAIN, "version", "python"), max),
    Described(
        "sqspipes_engine_info",
        "info",
        'Where the queues are, and how requests go there: transport is "fast" or "boto3" on SQS, "" elsewhere.',
        (*_DOMAIN, "broker", "transport"),
        max,
    ),
)
_WORKER_STATES = ("booting", "idle", "busy", "resting", "leaving", "ended")
_OUTCOMES = ("done", "retried", "dead_lettered", "continued", "cancelled")
#: Every doubling of the statistics' histogram from 131 microseconds to 73 minutes: its bucket, and its end in seconds.
_ENDS = [(4 * doubling, f"{(1024 << doubling) / 1e9:g}") for doubling in range(7, 33)]


class Totals:
    """The counters of all engines there were; none goes back while the process lives.

    The words of one value may be read between two writes, and an engine that ends takes its counters along.
    """

    def __init__(self) -> None:
        self._known: dict[str, dict[Key, float]] = {}

    def take(self, run: str, counted: Iterable[Sample]) -> None:
        """Take in the counters of one engine, by its run's id."""
        known = self._known.setdefault(run, {})
        for key, value in counted:
            known[key] = max(value, known.get(key, 0.0))

    def end(self, run: str) -> None:
        """Keep what an engine has counted that is gone, without itself."""
        past = self._known.setdefault("", {})
        for key, value in self._known.pop(run, {}).items():
            past[key] = past.get(key, 0.0) + value

    def sums(self) -> dict[Key, float]:
        """Return each counter, of all engines together."""
        found: dict[Key, float] = {}
        for known in self._known.values():
            for key, value in known.items():
                found[key] = found.get(key, 0.0) + value
        return found


class Collector:
    """A collector of prometheus_client."""

    def __init__(self, engines: Callable[[], Sequence[Looked]]) -> None:
        self._engines = engines
        self._totals = Totals()

    def collect(self) -> Iterator[Metric]:
        """Return every metric of every engine now."""
        gauges: dict[Key, list[float]] = {}
        for looked in self._engines():
            self.count(looked)
            for key, value in _gauges(looked):
                gauges.setdefault(key, []).append(value)
        counters = self._totals.sums()
        for metric in METRICS:
            yield _family(metric, counters, gauges)

    def count(self, looked: Looked) -> None:
        """Take in an engine's counters."""
        self._totals.take(looked.engine.run, _counters(looked))

    def ended(self, looked: Looked) -> None:
        """Take in an engine's counters for the last time."""
        self.count(looked)
        self._totals.end(looked.engine.run)


def _family(metric: Described, counters: Mapping[Key, float], gauges: Mapping[Key, list[float]]) -> Metric:
    if metric.kind == "histogram":
        return _histogram(metric, counters)
    if metric.kind == "counter":
        counter = CounterMetricFamily(metric.name.removesuffix("_total"), metric.help, labels=metric.labels)
        for (name, labels), value in counters.items():
            if name == metric.name:
                counter.add_metric(labels, value)
        return counter
    if metric.kind == "info":
        info = InfoMetricFamily(metric.name.removesuffix("_info"), metric.help, labels=())
        for name, labels in gauges:
            if name == metric.name:
                info.add_metric((), dict(zip(metric.labels, labels, strict=True)))
        return info
    gauge = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
    for (name, labels), values in gauges.items():
        if name == metric.name:
            gauge.add_metric(labels, metric.merge(values))
    return gauge


def _histogram(metric: Described, counters: Mapping[Key, float]) -> Metric:
    family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
    buckets: dict[tuple[str, ...], list[tuple[str, float]]] = {}
    for (name, labels), value in counters.items():
        if name == f"{metric.name}_bucket":
            buckets.setdefault(labels[:-1], []).append((labels[-1], value))
    for labels, found in buckets.items():
        family.add_metric(labels, found, counters.get((f"{metric.name}_sum", labels), 0.0))
    return family


# -- one engine -------------------------------------------------------------------------------------------------------


def _counters(looked: Looked) -> Iterator[Sample]:
    state, statistics = looked.state(), looked.statistics
    if state is None or statistics is None:
        return
    domain = str(state["engine"]["domain"])
    names = looked.engine.stages
    for stage in state["stages"]:
        where = domain, stage["name"]
        slots = _slots(statistics, names.index(stage["name"]))
        for outcome in _OUTCOMES:
            yield ("sqspipes_messages_total", (*where, outcome)), stage[outcome]
        for reason, count in stage["failures"].items():
            yield ("sqspipes_call_failures_total", (*where, reason)), count
        for outcome in ("sent", "dropped"):
            yield ("sqspipes_outputs_total", (*where, outcome)), stage[outcome]
        for reason, count in stage["restarts"].items():
            yield ("sqspipes_worker_restarts_total", (*where, reason)), count
        yield ("sqspipes_leases_lost_total", where), stage["leases_lost"]
        yield ("sqspipes_cpu_seconds_total", where), stage["cpu_seconds"]
        yield ("sqspipes_empty_receives_total", where), _total(statistics, slots, EMPTY_RECEIVES)
        busy = _total(statistics, slots, BUSY_NS) / 1e9
        yield ("sqspipes_busy_seconds_total", where), busy
        yield from _buckets("sqspipes_call_duration_seconds", where, statistics.histogram(slots, RUN_TIMES), busy)
        waited = _total(statistics, slots, QUEUE_WAIT_NS) / 1e9
        yield from _buckets("sqspipes_queue_wait_seconds", where, statistics.histogram(slots, QUEUE_WAITS), waited)
    for operation in OPERATIONS:
        yield ("sqspipes_broker_requests_total", (domain, operation)), state["broker"]["requests"][operation]
        for kind in ERROR_KINDS:
            yield ("sqspipes_broker_errors_total", (domain, operation, kind)), 0
    for error in state["broker"]["errors"]:
        yield ("sqspipes_broker_errors_total", (domain, error["operation"], error["kind"])), error["count"]


def _slots(statistics: Statistics, stage: int) -> list[int]:
    return [slot for slot in range(statistics.shape.slots) if statistics.get(slot, STAGE) == stage + 1]


def _total(statistics: Statistics, slots: Sequence[int], field: SlotField) -> int:
    return sum(statistics.get(slot, field) for slot in slots)


def _buckets(name: str, where: tuple[str, ...], counts: Sequence[int], total: float) -> Iterator[Sample]:
    upto = [0, *accumulate(counts)]
    for bucket, end in _ENDS:
        yield (f"{name}_bucket", (*where, end)), upto[bucket]
    yield (f"{name}_bucket", (*where, "+Inf")), upto[BUCKETS]
    yield (f"{name}_sum", where), total


def _gauges(looked: Looked) -> Iterator[Sample]:
    state = looked.state()
    if state is None:
        return
    engine, now = state["engine"], state["at"]
    domain = str(engine["domain"])
    for stage in state["stages"]:
        where = domain, stage["name"]
        workers = [worker for worker in state["workers"] if worker["stage"] == stage["name"]]
        for each in _WORKER_STATES:
            yield ("sqspipes_workers", (*where, each)), sum(worker["state"] == each for worker in workers)
        yield from _stage_gauges(where, stage, now)
        used = [worker["memory"] for worker in workers if worker["memory"] is not None]
        if used:
            yield ("sqspipes_worker_memory_bytes", where), sum(used)
            yield ("sqspipes_worker_memory_max_bytes", where), max(used)
    for who in ("keeper", "supervisor"):
        if engine[f"{who}_beat"] is not None:
            yield (f"sqspipes_{who}_last_beat_timestamp_seconds", (domain,)), now - engine[f"{who}_beat"]
    yield ("sqspipes_build_info", (domain, str(engine["version"]), str(engine["python"]))), 1
    yield ("sqspipes_engine_info", (domain, str(engine["broker"]), engine["transport"] or "")), 1


def _stage_gauges(where: tuple[str, str], stage: Mapping[str, Any], now: float) -> Iterator[Sample]:
    yield ("sqspipes_workers_wanted", where), stage["wanted"]
    yield ("sqspipes_paused", where), float(stage["paused"])
    yield ("sqspipes_running_calls", where), stage["running"]
    if stage["oldest_call"] is not None:
        yield ("sqspipes_oldest_call_start_timestamp_seconds", where), now - stage["oldest_call"]
    if stage["last_receive"] is not None:
        yield ("sqspipes_last_receive_timestamp_seconds", where), now - stage["last_receive"]
    if stage["dead_letters"] is not None:
        yield ("sqspipes_dead_letters", where), stage["dead_letters"]
    for counted in stage["queues"]:
        for each in QUEUE_STATES:
            if counted[each] is not None:
                yield ("sqspipes_queue_messages", (*where, str(counted["priority"]), each)), counted[each]
