"""The storm: programs run the pipeline; by seeded dice their processes are killed, stopped and started again.

What happens is drawn from the seed; when exactly it hits depends on the machine, so a seed repeats the kind of trouble
and not each interleaving.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.chaos.pipeline import POISON, STAGES, engine
from benchmarks.chaos.verdict import Verdict, feed, items, judge, underway
from benchmarks.watching import ROOT, Log, alive, children, eventually
from sqspipes_mp import SQS, SQLite
from sqspipes_mp.ipc.running.asking import ask
from sqspipes_mp.ipc.running.folders import VARIABLE, Engine, Unanswered, engines
from standin import StandIn, standin

#: What goes wrong at the stand-in.
FAULTS = {"throttle": 0.02, "reset_before": 0.01, "lost_reply": 0.01, "duplicate": 0.01, "partial": 0.02}

#: What may happen in a turn, with weights.
_TROUBLES = {
    "worker killed": 80,
    "worker stopped": 8,
    "keeper killed": 5,
    "keeper stopped": 4,
    "program stopped": 3,
}
#: Orders that may come beside them, with weights.
_ORDERS = {"stage paused": 8, "stage resized": 8}
#: Most workers that an order asks for, and seconds that its answer may take: it is carried out all the same.
_MOST_WORKERS, _PATIENCE = 4, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """``broker``: "sqs" (standard queues), "fifo" or "sqlite". Times in seconds.

    ``every``: between two turns of the storm, on average, each of which hits something; ``restart``: between two hits
    on a whole program. It rages from the moment a worker is ready until all is done, but for ``least`` to ``most``
    turns. ``first``: what the first turns do, in this order, before the dice decide. ``backoff``: longest wait of a
    retry, None for the package's. ``bound``: after so long all must be done.
    """

    broker: str
    items: int = 20_000
    poison: int = 12
    seed: int = 1
    programs: int = 2
    visibility: float = 10.0
    every: float = 0.5
    restart: float = 15.0
    least: int = 8
    most: int = 500
    first: tuple[str, ...] = ()
    backoff: float | None = None
    bound: float = 600.0
    kinds: tuple[str, ...] = POISON
    #: Milliseconds before each reply of the stand-in.
    latency: float = 0.0
    #: Whether stages are paused and resized, too.
    orders: bool = True


@dataclass(slots=True)
class Result:
    """What came of a storm; ``broken``: the rules that were, each as a line."""

    verdict: Verdict
    seconds: float
    done: Counter[str]
    requests: int
    faults: dict[str, int]
    broken: list[str]


@dataclass(slots=True)
class Program:
    """One machine of the storm."""

    process: subprocess.Popen[bytes]
    below: list[psutil.Process] = field(default_factory=list)

    def look(self) -> list[psutil.Process]:
        """Return its children now; remembers them, so that orphans can be told."""
        found = children(self.process.pid)
        self.below += [child for child in found if child not in self.below]
        return found


class Storm:
    """Programs, and what is done to them."""

    def __init__(self, weather: Weather, folder: Path, broker: str) -> None:
        self.weather = weather
        self.dice = random.Random(weather.seed)
        self.pids = Log(str(folder / "pids"))
        self.done: Counter[str] = Counter()
        self.orphans = 0
        self.turns = 0
        self._folder = folder
        self._broker = broker
        self._stopped: list[tuple[float, list[int]]] = []
        #: Stages that are paused, and until when.
        self._paused: list[tuple[float, Engine, str]] = []
        self._troubles = _TROUBLES | (_ORDERS if weather.orders else {})
        self._first = deque(weather.first)
        self._programs = [self._start() for _ in range(weather.programs)]

    def turn(self, now: float) -> None:
        """Do one bad thing to some process."""
        self.wake(now)
        if not self.pids.lines():
            return
        for place, program in enumerate(self._programs):
            if program.process.poll() is not None:
                # A restart limit is a legal end under constant killing; a service manager starts it again.
                self.done[f"program ended with {program.process.returncode}"] += 1
                self._bury(program)
                self._programs[place] = self._start()
        program = self.dice.choice(self._programs)
        if self._first:
            if not self._do(self._first[0], program, now):
                # Not there just now, being restarted, say: in the next turn, then.
                return
            self._first.popleft()
        else:
            [what] = self.dice.choices(list(self._troubles), list(self._troubles.values()))
            if self.dice.random() < self.weather.every / self.weather.restart:
                what = "supervisor asked to stop" if self.dice.random() < 0.3 else "supervisor killed"
            self._do(what, program, now)
        self.turns += 1

    def _do(self, what: str, program: Program, now: float) -> bool:
        """Do it to one of the program's processes; tells whether there was one."""
        keeper, workers = self._kinds(program)
        match what.split():
            case ["supervisor", *_]:
                if program.process.poll() is not None:
                    return False
                self._end(what, program)
                return True
            case ["stage", how]:
                return self._order(what, how, program, now)
            case ["program", _]:
                # As a laptop that is closed: all leases end while it sleeps, and then it goes on where it was.
                pids = [program.process.pid, *(child.pid for child in keeper + workers)]
                # One that is only just starting has nothing to lose.
                return len(pids) > 1 and self._stop(what, pids, now)
            case [who, how]:
                victims = keeper if who == "keeper" else workers
                if not victims:
                    return False
                pid = self.dice.choice(victims).pid
                return self._hit(what, pid) if how == "killed" else self._stop(what, [pid], now)
        raise ValueError(what)

    def _order(self, what: str, how: str, program: Program, now: float) -> bool:
        """Give one of the program's stages an order, over the socket."""
        running = next((each for each in engines() if each.number("pid") == program.process.pid), None)
        if running is None:
            return False
        stage = self.dice.choice(STAGES)
        if how == "paused":
            order: dict[str, object] = {"do": "pause", "stage": stage}
            self._paused.append((now + self.dice.uniform(0.1, self.weather.visibility), running, stage))
        else:
            order = {"do": "scale", "stage": stage, "workers": self.dice.randint(1, _MOST_WORKERS)}
        _ask(running, order)
        self.done[what] += 1
        return True

    def wake(self, now: float) -> None:
        """Let go on what has been stopped or paused for long enough."""
        for until, running, stage in self._paused:
            if until <= now:
                _ask(running, {"do": "resume", "stage": stage})
        self._paused = [entry for entry in self._paused if entry[0] > now]
        for until, pids in self._stopped:
            if until <= now:
                for pid in pids:
                    _signal(pid, signal.SIGCONT)
        self._stopped = [entry for entry in self._stopped if entry[0] > now]

    def calm(self) -> None:
        """Let everything go on, and have every program running."""
        self.wake(float("inf"))
        self.keep_running()

    def keep_running(self) -> None:
        for place, program in enumerate(self._programs):
            if program.process.poll() is not None:
                self.done[f"program ended with {program.process.returncode} in the calm"] += 1
                self._bury(program)
                self._programs[place] = self._start()

    def end(self) -> list[str]:
        """Stop the programs as an operator would. Returns what was wrong with that."""
        wrong = []
        for program in self._programs:
            # Before it has children it is Python's start that hears the signal.
            eventually(program.look, "a program that was started runs")
            program.process.terminate()
        for program in self._programs:
            try:
                code = program.process.wait(40)
            except subprocess.TimeoutExpired:
                wrong.append("a program did not end within 40 s of SIGTERM")
                program.process.kill()
                program.process.wait()
            else:
                if code != 0:
                    wrong.append(f"a program ended with {code} after SIGTERM")
            self._bury(program)
        if self.orphans:
            wrong.append(f"orphans: {self.orphans}")
        return wrong

    def abandon(self) -> None:
        """Leave nothing behind."""
        self.wake(float("inf"))
        for program in self._programs:
            program.look()
            for pid in (program.process.pid, *(child.pid for child in program.below)):
                if program.process.poll() is None or alive(pid):
                    _signal(pid, signal.SIGKILL)
            program.process.wait()

    def _start(self) -> Program:
        weather = self.weather
        backoff = "" if weather.backoff is None else str(weather.backoff)
        arguments = [self._broker, str(int(weather.broker == "fifo")), str(weather.visibility), self.pids.path, backoff]
        with (self._folder / "programs.log").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.chaos.pipeline", *arguments],
                env={**os.environ, "PYTHONPATH": str(ROOT), "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"},
                stdout=output,
                stderr=output,
            )
        return Program(process)

    def _kinds(self, program: Program) -> tuple[list[psutil.Process], list[psutil.Process]]:
        """Return its keeper, if there is one just now, and its workers: these are whom the kernel is to kill first."""
        found = program.look()
        own = _score(program.process.pid)
        keeper = [each for each in found if _score(each.pid) == own]
        return keeper, [each for each in found if each not in keeper]

    def _end(self, what: str, program: Program) -> None:
        if what.endswith("killed"):
            self._hit(what, program.process.pid)
            program.process.wait()
        else:
            self._hit(what, program.process.pid, signal.SIGTERM)

    def _hit(self, what: str, pid: int, number: int = signal.SIGKILL) -> bool:
        hit = _signal(pid, number)
        self.done[what] += hit
        return bool(hit)

    def _stop(self, what: str, pids: list[int], now: float) -> bool:
        for pid in pids:
            _signal(pid, signal.SIGSTOP)
        longest = 1.5 * self.weather.visibility
        self._stopped.append((now + self.dice.uniform(0.1, longest), pids))
        self.done[what] += 1
        return True

    def _bury(self, program: Program) -> None:
        """Count the children that outlive a program."""
        _, left = psutil.wait_procs(program.below, timeout=10)
        for child in left:
            if alive(child.pid):
                self.orphans += 1
                _signal(child.pid, signal.SIGKILL)


def _ask(engine: Engine, order: dict[str, object]) -> None:
    """Give an order to an engine that may stand still, or be gone."""
    with contextlib.suppress(Unanswered):
        ask(engine, order, _PATIENCE)


@contextlib.contextmanager
def _registry(folder: Path) -> Iterator[None]:
    """Have the storm's programs register where this process finds them, and nobody else."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(folder / "registry")
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def _score(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())
    return None


def _signal(pid: int, number: int) -> int:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return 1
    return 0


@contextlib.contextmanager
def _broker(weather: Weather, folder: Path) -> Iterator[tuple[str, SQS | SQLite, StandIn | None]]:
    """Yield a broker as text for programs, as an object for this process, and its stand-in."""
    if weather.broker == "sqlite":
        path = folder / "chaos.db"
        yield f"sqlite:///{path}", SQLite(path), None
        return
    with standin(seed=weather.seed, ghost_polls=1) as server:
        url = f"sqs://us-east-1?endpoint_url={server.url}"
        yield url, SQS("us-east-1", endpoint_url=server.url, access_key="x", secret_key="x"), server


def storm(weather: Weather, folder: Path, say: Callable[[str], object] = lambda _line: None) -> Result:
    """Feed the items, let the storm rage, wait for the calm, and judge."""
    values = items(weather.items, weather.poison, weather.kinds)
    clock = time.monotonic
    pause = threading.Event().wait
    with _registry(folder), _broker(weather, folder) as (text, broker, server):
        made = engine(broker, fifo=weather.broker == "fifo", visibility=weather.visibility, pids=Log(os.devnull))
        feed(made, values)
        if server is not None:
            server.faults(**FAULTS, latency_ms=weather.latency)
        started = told = clock()
        raging = Storm(weather, folder, text)
        broken = []
        try:
            while clock() < started + weather.bound:
                counts = underway(made, server)
                done = not any(counts[stage] for stage in STAGES)
                if raging.turns < weather.most and not (done and raging.turns >= weather.least):
                    pause(raging.dice.uniform(0.5, 1.5) * weather.every)
                    raging.turn(clock())
                elif done:
                    break
                else:
                    raging.calm()
                    pause(0.1)
                if clock() > told + 10:
                    told = clock()
                    say(f"{told - started:4.0f} s: {counts}")
            raging.calm()
            seconds = clock() - started
            if not done:
                broken.append(f"not done after {seconds:.0f} s: {counts}")
            broken += raging.end()
        finally:
            raging.abandon()
        faults, requests = {}, 0
        if server is not None:
            server.faults(**dict.fromkeys(FAULTS, 0), latency_ms=0)
            ledger = server.ledger(messages=False)
            faults = ledger["faults"]
            requests = sum(count["requests"] for count in ledger["requests"].values())
            broken += [f"limit violation: {violation}" for violation in ledger["violations"][:5]]
        verdict = judge(made, values)
        broken += verdict.broken(once=weather.broker != "sqs")
        return Result(verdict, seconds, raging.done, requests, faults, broken)
