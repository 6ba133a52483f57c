"""The tables of ``top``: at a narrow width columns go, and digits never; the notes that say what to do."""

import random
import re
from typing import Any

import pytest

from sqspipes_mp.cli.top.cells import cut, width_of
from sqspipes_mp.cli.top.columns import STAGES, WORKERS, Column, Fit, in_order
from sqspipes_mp.cli.top.plain import state_text
from sqspipes_mp.cli.top.stack_text import parted
from sqspipes_mp.ipc.running.notes import sentence
from sqspipes_mp.ipc.running.outcomes import outcome
from sqspipes_mp.ipc.running.state import add_notes
from sqspipes_mp.ipc.running.units import short_time


def stage_of(name: str, **values: Any) -> dict[str, Any]:
    numbers = dict.fromkeys(
        (
            "running",
            "waiting",
            "dead_letters",
            "done",
            "retried",
            "dead_lettered",
            "failed",
            "wanted",
            "ready",
            "cancelled",
        ),
        0,
    )
    return {
        "name": name, "paused": False, "bottleneck": False, "threads": 1, "oldest_call": None, "queues": [],
        "long_call": False, "busy": None, "cpu": None, "eta": None, "failures": {}, "restarts": {},
        "per_second": dict.fromkeys(("done", "failed", "retried", "dead_lettered")),
        "run_time": {"p50": None, "p95": None}, "queue_wait": {"p50": None, "p95": None},
        **numbers, **values,
    }  # fmt: skip


def worker_of(stage: str, number: int, **values: Any) -> dict[str, Any]:
    idle = {"pid": 1000 + number, "state": "idle", "call_age": None, "calls": [], "memory": None, "cpu": None}
    idle["long_call"] = False
    return {"stage": stage, "worker": number, "done": 0, "restarts": 0, **idle, **values}


def state_of(stages: list[dict[str, Any]], workers: list[dict[str, Any]]) -> dict[str, Any]:
    engine = {"domain": "d", "broker": "b", "pid": 7, "up": 3.0, "live": True, "ready": True, "target": "words:engine"}
    state = {"engine": {**engine, "why": "every stage is ready"}, "stages": stages, "workers": workers}
    add_notes(state)
    return state


def some_number(random_: random.Random) -> int:
    return int(10 ** random_.uniform(0, 9))


def some_stage(random_: random.Random) -> dict[str, Any]:
    any_of = lambda: random_.choice([None, 10 ** random_.uniform(-6, 7)])  # noqa: E731
    stage = stage_of(random_.choice(["s", "reduce", "漢字の段階", "a_stage_with_a_long_name"]))
    for key, value in stage.items():
        if value == 0:
            stage[key] = some_number(random_)
    return stage | {
        "paused": random_.random() < 0.2, "bottleneck": random_.random() < 0.5, "busy": random_.random(),
        "oldest_call": any_of(), "eta": any_of(), "run_time": {"p50": any_of(), "p95": any_of()},
        "queues": [{"priority": 0, "waiting": 1, "in_flight": some_number(random_), "delayed": None}],
    }  # fmt: skip


def some_worker(random_: random.Random) -> dict[str, Any]:
    calls = [{"id": f"{7:064x}", "age": random_.random() * 1e6, "fraction": 0.1234, "text": "a \x1b[31m of b"}]
    return worker_of(
        random_.choice(["s", "a_stage_with_a_long_name"]), random_.randrange(1000), pid=some_number(random_),
        calls=calls * random_.randrange(4), call_age=random_.random() * 1e6, memory=some_number(random_) * 999,
    )  # fmt: skip


@pytest.mark.parametrize("columns", [STAGES, WORKERS], ids=["stages", "workers"])
def test_columns_go_at_narrow_widths_and_no_number_is_cut(columns: tuple[Column, ...]) -> None:
    random_ = random.Random(3)
    some = some_stage if columns is STAGES else some_worker
    assert len({column.rank for column in columns}) == len(columns)
    for width in range(30, 220):
        rows = [some(random_) for _ in range(3)]
        gap = 1 + width % 2
        placed = Fit(columns).place(rows, width, gap)
        assert sum(each.width for each in placed) + gap * (len(placed) - 1) <= width
        kept = {each.column.rank for each in placed}
        assert kept == set(sorted(column.rank for column in columns)[: len(kept)])
        for row in rows:
            for each in placed:
                text = each.column.cell(row).text
                shown = each.pad(text)
                assert width_of(shown) == each.width
                assert text.isprintable()
                assert shown.strip() == text or each.column.least
                # A worker's number is in its name.
                assert each.column.head != "worker" or shown.rstrip()[-2:] == text[-2:]


def test_all_columns_are_there_where_there_is_room_and_they_stand_still() -> None:
    fit = Fit(STAGES)
    rows = [stage_of("s", waiting=1_000_000)]
    assert [each.column for each in fit.place(rows, 300, 2)] == list(STAGES)
    before = fit.place(rows, 300, 2)
    assert fit.place([stage_of("s", waiting=0)], 300, 2) == before


def test_plain_text_fits_its_terminal_in_both_directions() -> None:
    stages = [stage_of(f"stage{number}", bottleneck=number == 1, busy=0.95, waiting=30) for number in range(3)]
    workers = [worker_of("stage1", number) for number in range(64)]
    for width, height in ((60, 24), (80, 30), (140, 50)):
        text = state_text(state_of(stages, workers), width, height)
        lines = text.splitlines()
        assert max(map(len, lines)) <= width
        assert len(lines) == height - 1
        assert re.search(r"\d+ more workers$", text)
        assert "* the bottleneck" in text
    assert len(state_text(state_of(stages, workers), 60).splitlines()) > 64


def test_times_and_cuts() -> None:
    times = {
        0: "0s", 1.5e-5: "15us", 0.0009996: "1ms", 0.45: "450ms", 0.9996: "1.0s", 9.94: "9.9s", 9.96: "10s",
        59.6: "1m00s", 184: "3m04s", 3599.7: "1h00m", 7500: "2h05m", 273_600: "3d04h", 31_449_600: "364d",
    }  # fmt: skip
    assert {seconds: short_time(seconds) for seconds in times} == times
    assert cut("numbers[12]", 11) == "numbers[12]"
    assert cut("numbers[12]", 8, 5) == "nu…s[12]"
    assert cut("漢字漢字", 5) == "漢字…"
    assert cut("numbers[12]", 3, 5) == "nu…"


def told(state: dict[str, Any], *, keys: bool = True) -> list[str]:
    return [sentence(note, keys=keys) for note in state["notes"]]


def test_the_notes_name_what_is_slow_failing_or_stuck_and_the_cure() -> None:
    stuck = stage_of("parse", oldest_call=300.0, run_time={"p50": 0.1, "p95": 0.2})
    failing = stage_of(
        "check", failed=4, done=96, retried=3, cancelled=1, dead_lettered=2, failures={"exception": 4, "crash": 0}
    )
    slow = stage_of("reduce", bottleneck=True, busy=0.97, waiting=1_234, wanted=2)
    dying = stage_of("load", restarts={"crash": 3, "max_tasks": 9})
    paused = stage_of("store", paused=True, waiting=7)
    workers = [worker_of("parse", number, call_age=age) for number, age in enumerate([1.0, 300.0, None, 200.0])]
    state = state_of([slow, failing, stuck, dying, paused], workers)
    here = "s shows where it is, c cancels it"
    why = "sqspipes-mp dead list words:engine --stage check tells why; once mended, dead redrive"
    assert told(state) == [
        f"parse[1]: a call runs for 5m00s, where 95% take less than 200ms (and 1 more worker): {here}",
        "load: 3 workers had to be replaced (crash 3): the log says why",
        f"check: 4 of 100 calls failed (exception 4), 3 were tried again; 1 call cancelled; 2 dead letters: {why}",
        "store is paused, 7 wait: p has it go on",
        "reduce is the bottleneck (97% busy, 1,234 wait): + gives it a worker",
    ]
    commands = "\n".join(told(state, keys=False))
    for command in ("stack d --stage parse --worker 1", "resume d --stage store", "scale d reduce=3"):
        assert f"sqspipes-mp {command}" in commands
    # No green line stands above troubles.
    assert state["verdict"] == {
        "tone": "bad",
        "told": "every stage is ready, but a call of parse[1] runs for 5m00s; load: 3 workers had to be replaced; "
        "check: 2 dead letters; and 1 more",
    }
    assert [worker["worker"] for worker in in_order(workers)] == [1, 3, 0, 2]
    # Calls that are always long are not stuck.
    well = state_of([stage_of("long", oldest_call=300.0, run_time={"p50": 90, "p95": 100})], [])
    assert (told(well), well["verdict"]) == ([], {"tone": "good", "told": "every stage is ready"})


def test_a_printed_command_works_where_it_is_pasted() -> None:
    state = state_of([stage_of("check", dead_lettered=1)], [])
    state["engine"] |= {"target": "", "folder": "/srv/my shop"}
    add_notes(state)
    command = "cd '/srv/my shop' && sqspipes-mp dead list MODULE:ENGINE --stage check"
    unknown = "(MODULE:ENGINE: words:engine for engine in words.py)"
    assert told(state) == told(state, keys=False)
    assert told(state) == [f"check: 1 dead letter: {command} tells why {unknown}; once mended, dead redrive"]


@pytest.mark.parametrize(
    ("busy", "cpu", "wanted", "cure"),
    [
        (0.5, 1.9, 2, "it has a worker per CPU (2): more machines, or less work per call"),
        (0.97, 1.0, 1, "no CPU is free: more machines, or less work per call"),
        (0.97, 0.05, 1, "+ gives it a worker (if its calls wait for something: no CPU is free)"),
        (0.97, 0.05, 2, "no CPU is free: more machines, or less work per call"),
        (0.5, 0.05, 2, "+ gives it a worker"),
        (None, None, 2, "+ gives it a worker"),
    ],
)
def test_a_worker_more_is_no_cure_where_no_cpu_is_free(
    busy: float | None, cpu: float | None, wanted: int, cure: str
) -> None:
    slow = stage_of("reduce", bottleneck=True, busy=0.95, waiting=9, wanted=wanted, cpu=cpu)
    state = state_of([slow, stage_of("tell")], [])
    state["machine"] = {"cpus": 2, "busy": busy}
    add_notes(state)
    assert told(state) == [f"reduce is the bottleneck (95% busy, 9 wait): {cure}"]
    assert state["notes"][0]["on_row"] is cure.startswith("+")


def test_one_stage_alone_is_nobodys_bottleneck() -> None:
    source = stage_of("reduce", bottleneck=True, busy=0.99, waiting=None)
    assert told(state_of([source], [])) == []
    assert told(state_of([source, stage_of("tell")], [])) == [
        "reduce is the bottleneck (99% busy): the other stages wait for it"
    ]
    assert told(state_of([{**source, "waiting": 3}], [])) == ["reduce is 99% busy, 3 wait: + gives it a worker"]


def test_the_outcome_of_an_order_is_told_with_its_reach_where_that_matters() -> None:
    reach = {"reach": "this engine, until it ends; other machines go on"}
    scaled = {"workers": 3, "was": 2, "booting": 0, "leaving": 1, **reach}
    assert outcome({"do": "scale", "stage": "work"}, scaled) == (
        "work: 3 workers, 2 before; 1 still run (this engine, until it ends; other machines go on)"
    )
    cancelled = {"cancelled": "0123456789abcdef", "stage": "work", "worker": 1, "beside": 2, **reach}
    assert outcome({"do": "cancel", "call": "0123"}, cancelled) == (
        "work[1]: the call 0123456789ab is cancelled, its message is a dead letter; 2 calls beside it will run again"
    )
    for order in ({"do": "stop"}, {"do": "stack", "stage": "work"}, {"do": "look"}):
        assert "machines" not in outcome(order, {"stacks": [1], "silent": [], **reach})


def test_stacks_of_the_library_are_named_and_those_of_the_users_code_shown() -> None:
    parts = [
        'Thread MainThread:\n  File "/a/sqspipes_mp/worker/run/function.py", line 1, in call\n',
        'Thread intake:\n  File "/usr/lib/threading.py", line 1, in wait\n',
        'Thread mine:\n  File "/home/shop.py", line 2, in mail\n    Thread: no thread\n',
    ]
    assert parted("\n".join(parts)) == (f"{parts[0]}\n{parts[2]}".rstrip(), ["intake"])
