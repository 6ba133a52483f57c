"""What sqspipes 0.3.3 really sent (tests/wire, recorded) is read, and sent to, as it was."""

import json
from pathlib import Path

import pytest

from sqspipes_mp.messages.envelope import Encoder, decode
from sqspipes_mp.pipeline.outputs import Products
from sqspipes_mp.pipeline.plan import Settings, make_plan
from sqspipes_mp.pipeline.stages import build
from sqspipes_mp.pipeline.task import Task

RECORDS = [
    json.loads(line) for line in (Path(__file__).parents[1] / "wire" / "sqspipes-0.3.3.jsonl").read_text().splitlines()
]
WORDS = ["word", "", "naïve ☃ 𝄞", 0, 1.5, True, ["a", 1], {"k": [1, {"n": None}]}, ["t", 2], 'quote " and \\ and \n']


def gen():
    return "word"


def step(value):
    return {"got": value}


def sink(value):
    return None


def expected(stage, ignore_none):
    values = WORDS if ignore_none else [*WORDS, None]
    return values if stage == "gen" else [{"got": value} for value in values]


RUNS = sorted({(r["fifo"], r["run_priority"], r["ignore_none"], r["stage"]) for r in RECORDS})


@pytest.mark.parametrize(("fifo", "priority", "ignore_none", "stage"), RUNS)
def test_recorded_bodies_decode_to_the_values_sent(fifo, priority, ignore_none, stage):
    run = [
        r
        for r in RECORDS
        if (r["fifo"], r["run_priority"], r["ignore_none"], r["stage"]) == (fifo, priority, ignore_none, stage)
    ]
    messages = [decode(r["body"], f"id-{n}") for n, r in enumerate(run)]
    values = [m.value for m in messages]
    assert values == expected(stage, ignore_none)
    assert [type(value) for value in values] == [type(value) for value in expected(stage, ignore_none)]
    for n, message in enumerate(messages):
        assert (message.id, message.parent, message.priority) == (f"id-{n}", f"id-{n}", priority)
        assert message.meta == {"priority": priority}


def test_the_record_has_every_run():
    assert len(RECORDS) == 168
    assert len(RUNS) == 16


@pytest.mark.parametrize("record", RECORDS[::7], ids=lambda r: r["queue"])
def test_our_bodies_mean_the_same_json(record):
    loaded = json.loads(record["body"])
    assert json.loads(Encoder("gen", None).encode(loaded["value"], loaded["meta"])) == loaded


@pytest.mark.parametrize("fifo", [True, False])
def test_queue_names_are_the_recorded_ones(fifo):
    pipeline = build([Task(gen, priorities=3), Task(step, priorities=3), sink], domain="rec", fifo=fifo, visibility=60)
    for record in (r for r in RECORDS if r["fifo"] is fifo):
        stage = pipeline.stage(record["stage"])
        assert stage.outputs[record["run_priority"]] == record["queue"]
        assert record["queue"] in pipeline.stages[stage.index + 1].inputs


@pytest.mark.parametrize("levels", [1, 3, 16])
@pytest.mark.parametrize("fifo", [True, False])
def test_what_we_make_of_a_recorded_message_is_as_sqspipes_reads_it(fifo, levels):
    """sqspipes runs fn(payload["value"]), hands payload["meta"] on, and sends to out_queues[meta["priority"]]."""
    pipeline = build(
        [Task(gen, priorities=3), Task(step, priorities=levels), sink], domain="rec", fifo=fifo, visibility=60
    )
    stage = pipeline.stage("step")
    products = Products(make_plan(pipeline, Settings(ignore_none=False)), stage)
    hops = set()
    for number, record in enumerate(RECORDS):
        body = json.loads(record["body"])
        body["meta"]["x-mine"] = {"kept": number}
        message = decode(json.dumps(body), f"id-{number}")
        output = products.make(message.value, message, message.parent, 0).output
        payload = json.loads(output.body)
        assert payload["value"] == body["value"]
        level = min(record["run_priority"], levels - 1)
        assert payload["meta"] == {
            "priority": level,
            "x-mine": {"kept": number},
            "id": f"id-{number}",
            "hop": output.hop,
        }
        assert list(stage.outputs)[payload["meta"]["priority"]] == output.queue
        assert output.group == (output.hop if fifo else None)
        hops.add(output.hop)
    assert len(hops) == len(RECORDS)


def test_the_record_shows_one_group_and_a_new_deduplication_id_each_time():
    fifo = [r for r in RECORDS if r["fifo"]]
    assert {r["group"] for r in fifo} == {"-"}
    assert len({r["dedup"] for r in fifo}) == len(fifo)
    assert all("group" not in r and "dedup" not in r for r in RECORDS if not r["fifo"])
