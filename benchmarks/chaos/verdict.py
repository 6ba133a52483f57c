"""What the queues say when the storm is over: each value's results, dead letters and whereabouts."""

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.chaos.pipeline import POISON, STAGES, Value
from sqspipes_mp import Engine
from sqspipes_mp.brokers.base import Completion, Output
from standin import StandIn


def items(count: int, poison: int, kinds: Sequence[str] = POISON) -> list[Value]:
    """Return the values to feed: ``poison`` of them, spread evenly, fail for good in some stage."""
    values: list[Value] = [[number, [], None, None] for number in range(count)]
    for index in range(poison):
        number = (2 * index + 1) * count // (2 * poison)
        values[number][2:] = [STAGES[index % len(STAGES)], kinds[index % len(kinds)]]
    return values


def feed(engine: Engine, values: list[Value]) -> None:
    """Put the values into the first stage's input queue, once each."""
    queue = engine.pipeline.stage(STAGES[0]).inputs[-1]
    with contextlib.closing(engine.broker.open()) as connection:
        connection.ensure(engine.pipeline.queues, create=True)
        outputs = []
        for value in values:
            body = json.dumps({"meta": {"priority": 0, "id": f"item-{value[0]}"}, "value": value})
            hop = f"item-{value[0]}"
            outputs.append(Output(queue, body, hop, group=hop if engine.pipeline.fifo else None))
        for start in range(0, len(outputs), 100):
            connection.complete([Completion(None, (output,)) for output in outputs[start : start + 100]])


def underway(engine: Engine, server: StandIn | None) -> dict[str, int]:
    """Count each stage's input queue, received or not, and last the results."""
    names = (*STAGES, "never")
    if server is None:
        stats = engine.stats()
        return {name: stats[name].visible + stats[name].in_flight + stats[name].delayed for name in names}
    # Asked beside the wire, where nothing fails; all at one instant.
    queues = server.ledger(messages=False)["queues"]
    counts = {}
    for name in names:
        [queue] = engine.pipeline.stage(name).inputs
        counts[name] = sum(queues[queue][state] for state in ("visible", "in_flight", "delayed"))
    return counts


@dataclass(frozen=True, slots=True)
class Verdict:
    """Numbers of values. ``wrong``: results whose steps are not the three stages in order."""

    results: int
    lost: tuple[int, ...]
    doubled: tuple[int, ...]
    wrong: tuple[int, ...]
    innocent_dead: tuple[int, ...]
    poison_alive: tuple[int, ...]
    dead: int
    dead_twice: tuple[int, ...]

    def broken(self, *, once: bool) -> list[str]:
        """Return the rules broken; ``once``: this broker promises that nothing is doubled."""
        rules = {
            "lost": self.lost,
            "doubled downstream": self.doubled if once else (),
            "wrong results": self.wrong,
            "innocents dead-lettered": self.innocent_dead,
            "poison that came through": self.poison_alive,
            "dead-lettered twice": self.dead_twice if once else (),
        }
        return [f"{name}: {len(found)} {list(found[:10])}" for name, found in rules.items() if found]


def judge(engine: Engine, values: list[Value]) -> Verdict:
    """Read results and dead letters out of their queues and compare."""
    results: Counter[int] = Counter()
    wrong = []
    [queue] = engine.pipeline.stage("never").inputs
    with contextlib.closing(engine.broker.open()) as connection:
        while found := connection.receive([queue], connection.batch, 0.5, 3600.0):
            for received in found:
                number, steps, _, _ = json.loads(received.body)["value"]
                results[number] += 1
                if steps != list(STAGES):
                    wrong.append(number)
            connection.complete([Completion(received.handle) for received in found])
    dead: Counter[int] = Counter(json.loads(letter.body)["value"][0] for letter in engine.dead_letters())
    poison = {value[0] for value in values if value[2] is not None}
    everything = {value[0] for value in values}
    return Verdict(
        results=results.total(),
        lost=tuple(sorted(everything - results.keys() - dead.keys())),
        doubled=tuple(sorted(number for number, times in results.items() if times > 1)),
        wrong=tuple(wrong),
        innocent_dead=tuple(sorted(dead.keys() - poison)),
        poison_alive=tuple(sorted(poison & results.keys())),
        dead=dead.total(),
        dead_twice=tuple(sorted(number for number, times in dead.items() if times > 1)),
    )
