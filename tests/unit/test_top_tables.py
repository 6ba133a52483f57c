"""The tables of ``top``: at a narrow width columns go, and digits never; the notes that say what to do."""

import random
import re
from typing import Any

import pytest

from sqspipes_mp.cli.top.cells import cut, short_time, width_of
from sqspipes_mp.cli.top.columns import STAGES, WORKERS, Column, Fit, in_order
from sqspipes_mp.cli.top.notes import notes
from sqspipes_mp.cli.top.plain import state_text


def stage_of(name: str, **values: Any) -> dict[str, Any]:
    numbers = dict.fromkeys(
        ("running", "waiting", "dead_letters", "done", "retried", "dead_lettered", "failed", "wanted", "ready"), 0
    )
    return {
        "name": name, "paused": False, "bottleneck": False, "threads": 1, "oldest_call": None, "queues": [],
        "busy": None, "cpu": None, "eta": None, "failures": {}, "restarts": {},
        "per_second": dict.fromkeys(("done", "failed", "retried", "dead_lettered")),
        "run_time": {"p50": None, "p95": None}, "queue_wait": {"p50": None, "p95": None},
        **numbers, **values,
    }  # fmt: skip


def worker_of(stage: str, number: int, **values: Any) -> dict[str, Any]:
    idle = {"pid": 1000 + number, "state": "idle", "call_age": None, "calls": [], "memory": None, "cpu": None}
    return {"stage": stage, "worker": number, "done": 0, "restarts": 0, **idle, **values}


def state_of(stages: list[dict[str, Any]], workers: list[dict[str, Any]]) -> dict[str, Any]:
    engine = {"domain": "d", "broker": "b", "pid": 7, "up": 3.0, "live": True, "why": "ready", "target": "words:engine"}
    return {"engine": engine, "stages": stages, "workers": workers}


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


def test_the_notes_name_what_is_slow_failing_or_stuck_and_the_cure() -> None:
    stuck = stage_of("parse", oldest_call=300.0, run_time={"p50": 0.1, "p95": 0.2})
    failing = stage_of("check", failed=4, done=96, dead_lettered=2, failures={"exception": 4, "crash": 0})
    slow = stage_of("reduce", bottleneck=True, busy=0.97, waiting=1_234, wanted=2)
    dying = stage_of("load", restarts={"crash": 3, "max_tasks": 9})
    paused = stage_of("store", paused=True)
    workers = [worker_of("parse", number, call_age=age) for number, age in enumerate([1.0, 300.0, None, 200.0])]
    state = state_of([slow, failing, stuck, dying, paused], workers)
    cure = "s shows where it is, c cancels it"
    assert [text for _, text in notes(state, keys=True)] == [
        f"parse[1]: a call runs for 5 min 00 s, where 95% take less than 200ms (and 1 more workers): {cure}",
        "load: 3 workers had to be replaced (crash 3): the log says why",
        "check: 4 of 100 calls failed (exception 4); 2 dead letters: sqspipes-mp dead list words:engine --stage check",
        "store is paused: p has it go on",
        "reduce is the bottleneck (97% busy, 1,234 wait): + gives it a worker",
    ]
    commands = "\n".join(text for _, text in notes(state, keys=False))
    for command in ("stack d --stage parse --worker 1", "resume d --stage store", "scale d reduce=3"):
        assert f"sqspipes-mp {command}" in commands
    assert [worker["worker"] for worker in in_order(workers)] == [1, 3, 0, 2]
    # Calls that are always long are not stuck.
    assert notes(state_of([stage_of("long", oldest_call=300.0, run_time={"p50": 90, "p95": 100})], []), keys=True) == []
