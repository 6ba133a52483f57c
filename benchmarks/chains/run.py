"""One seeded run: values are fed, a program works, everything of it is killed or drained, and the outputs compared."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.chains.job import STAGES, engine, program
from benchmarks.watching import children
from sqspipes_mp import SQS, SQLite
from sqspipes_mp.brokers.base import Completion, Output
from sqspipes_mp.messages.ids import continued_id
from standin import StandIn, standin

#: sqs: standard queues.
BROKERS = ("sqlite", "fifo", "sqs")
#: Hits of a run, and their weights.
_HITS = 7
_TROUBLES = {"worker killed": 60, "keeper killed": 8, "program killed": 12, "program drained": 20}
_DELETES = ("DeleteMessage", "DeleteMessageBatch")
#: Seconds between two hits, at most.
_EVERY = 0.5
#: Seconds after which a run must be done.
_BOUND = 90.0


@dataclass(slots=True)
class Result:
    """The outcome of a run."""

    broker: str
    seed: int
    seconds: float = 0.0
    #: Hits by their kind.
    done: Counter[str] = field(default_factory=Counter)
    #: Outputs that never came, came more than once, or should not be.
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    #: The rules broken, each as a line.
    broken: list[str] = field(default_factory=list)


class Run:
    """A run under way."""

    def __init__(self, broker: str, seed: int, folder: Path, values: int, units: int) -> None:
        self.result = Result(broker, seed)
        self._dice = random.Random(seed)
        self._folder = folder
        self._fifo = broker == "fifo"
        self._values, self._units = values, units
        self._pause = threading.Event()
        self._process: BaseProcess | None = None

    @contextlib.contextmanager
    def _place(self) -> Iterator[tuple[SQS | SQLite, StandIn | None]]:
        if self.result.broker == "sqlite":
            yield SQLite(self._folder / "chains.db"), None
            return
        with standin(seed=self.result.seed, ghost_polls=1) as server:
            broker = SQS("us-east-1", endpoint_url=server.url, access_key="x", secret_key="x")
            # Forked programs share what boto3 has parsed.
            broker.warm()
            yield broker, server

    def go(self) -> Result:
        """Run; returns the result."""
        with self._place() as (self._broker, self._server):
            self._engine = engine(self._broker, fifo=self._fifo)
            self._feed()
            began = time.monotonic()
            hits = [self._dice.choices(list(_TROUBLES), list(_TROUBLES.values()))[0] for _ in range(_HITS)]
            hits.insert(self._dice.randrange(3), "killed between send and delete")
            try:
                self._rage(hits, began + _BOUND)
            finally:
                self._kill_all()
            self.result.seconds = time.monotonic() - began
            self._judge()
        return self.result

    # -- the troubles -------------------------------------------------------------------------------------------

    def _rage(self, hits: list[str], until: float) -> None:
        while self._waiting():
            if time.monotonic() > until:
                self.result.broken.append(f"not done after {_BOUND:.0f} s")
                return
            if self._process is None or self._process.exitcode is not None:
                if self._process is not None:
                    self._process.join()
                self._start()
            self._pause.wait(self._dice.uniform(0.05, _EVERY) if hits else 0.2)
            if hits and self._hit(hits[0]):
                self.result.done[hits.pop(0)] += 1

    def _start(self) -> None:
        log = str(self._folder / "program.log")
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=program, args=(self._broker, log), kwargs={"fifo": self._fifo})
        self._process.start()

    def _hit(self, what: str) -> bool:
        """Do it; False: there was nobody to do it to."""
        assert self._process is not None
        if what == "killed between send and delete":
            return self._kill_in_the_gap()
        if what == "program killed":
            self._kill_all()
            return True
        if what == "program drained":
            return _signal(self._process.pid, signal.SIGTERM)
        found = children(self._process.pid)
        keepers = [child.pid for child in found if _score(child.pid) == _score(self._process.pid)]
        victims = keepers if what == "keeper killed" else [child.pid for child in found if child.pid not in keepers]
        return bool(victims) and _signal(self._dice.choice(victims), signal.SIGKILL)

    def _kill_in_the_gap(self) -> bool:
        """Kill everything while continuations are accepted and what they continue is not deleted."""
        if self._server is None:
            # One transaction does both: it is held up, and all die in it.
            with contextlib.closing(sqlite3.connect(self._folder / "chains.db", isolation_level=None)) as lock:
                lock.execute("PRAGMA busy_timeout = 20000")
                lock.execute("BEGIN IMMEDIATE")
                self._pause.wait(0.2)
                self._kill_all()
                lock.execute("ROLLBACK")
            return True
        self._server.faults(error=1, only=_DELETES)
        try:
            until = time.monotonic() + 5.0
            while time.monotonic() < until and self._waiting():
                if self._is_gap():
                    self._kill_all()
                    return True
                self._pause.wait(0.02)
            return False
        finally:
            self._server.faults(error=0, only=())

    def _is_gap(self) -> bool:
        assert self._server is not None
        for stage in STAGES:
            [queue] = self._engine.pipeline.stage(stage).inputs
            # A deleted message has no body any more.
            found = [body for message in self._server.messages(queue) if (body := message["body"])]
            hops = {json.loads(body)["meta"]["hop"] for body in found}
            if any(continued_id(hop, stage) in hops for hop in hops):
                return True
        return False

    def _kill_all(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for pid in (process.pid, *(child.pid for child in children(process.pid))):
            _signal(pid, signal.SIGKILL)
        process.join()

    # -- values and outputs -------------------------------------------------------------------------------------

    def _feed(self) -> None:
        [queue] = self._engine.pipeline.stage(STAGES[0]).inputs
        outputs = []
        for value in range(self._values):
            hop = continued_id(str(value), "fed")
            state = {"value": value, "units": self._units, "done": 0, "sum": 0}
            body = json.dumps({"meta": {"priority": 0, "id": str(value), "hop": hop}, "value": state})
            outputs.append(Output(queue, body, hop))
        self._broker.check()
        with contextlib.closing(self._broker.open()) as connection:
            connection.ensure(self._engine.pipeline.queues, create=True)
            for output in outputs:
                connection.complete([Completion(None, (output,))])

    def _waiting(self) -> int:
        """Count the messages of the two stages, received or not."""
        names = [queue for stage in STAGES for queue in self._engine.pipeline.stage(stage).inputs]
        if self._server is not None:
            # Asked beside the wire, where nothing fails.
            queues = self._server.ledger(messages=False)["queues"]
            return sum(queues[name][state] for name in names for state in ("visible", "in_flight", "delayed"))
        with contextlib.closing(self._broker.open()) as connection:
            depths = [connection.depth(name) for name in names]
        return sum(depth.visible + depth.in_flight + depth.delayed for depth in depths)

    def _judge(self) -> None:
        found: Counter[tuple[int, int]] = Counter()
        total = sum(range(self._units))
        with contextlib.closing(self._broker.open()) as connection:
            [queue] = self._engine.pipeline.stage("never").inputs
            # A receive may come back empty though there is more.
            while (batch := connection.receive([queue], connection.batch, 0.2, 3600.0)) or connection.depth(
                queue
            ).visible:
                for received in batch:
                    value, unit, made = json.loads(received.body)["value"]
                    found[value, unit] += 1
                    self.result.wrong += made != total
                connection.complete([Completion(received.handle) for received in batch])
        expected = {(value, unit) for value in range(self._values) for unit in range(self._units)}
        if not self.result.broken:
            self.result.lost = len(expected - found.keys())
        self.result.doubled = sum(1 for times in found.values() if times > 1)
        self.result.wrong += len(found.keys() - expected)
        broken = self.result.broken
        if self.result.lost:
            broken.append(f"lost: {self.result.lost}")
        if self.result.wrong:
            broken.append(f"wrong: {self.result.wrong}")
        if self.result.doubled and self.result.broker != "sqs":
            broken.append(f"doubled: {self.result.doubled}")
        if letters := self._engine.dead_letters():
            broken.append(f"dead letters: {[letter.failure.text for letter in letters[:3]]}")


def run(broker: str, seed: int, folder: Path, *, values: int = 5, units: int = 0) -> Result:
    """Run one seed; ``units`` of each value: 0 for as many as make several batches of outputs."""
    return Run(broker, seed, folder, values, units or (240 if broker == "sqlite" else 48)).go()


def run_in_time(broker: str, seed: int, until: float) -> Result | None:
    """Run one seed in a folder of its own; None: it is later than ``until`` (monotonic seconds)."""
    if time.monotonic() > until:
        return None
    with tempfile.TemporaryDirectory(prefix="chains-") as folder:
        result = run(broker, seed, Path(folder))
        if result.broken:
            log = Path(f"chains-{broker}-{seed}.log").absolute()
            log.write_bytes((Path(folder) / "program.log").read_bytes())
            result.broken.append(f"what the program said: {log}")
        return result


def _score(pid: int | None) -> Any:
    """Return whom the kernel would kill first: keepers as the supervisor, workers before them."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/oom_score_adj").read_text()
    return None


def _signal(pid: int | None, number: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid or 0, number)
        return True
    return False
