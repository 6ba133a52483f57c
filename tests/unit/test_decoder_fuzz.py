"""Whatever is in a queue, reading it gives a message or a ``DecodeError``, and nothing else.

Longer: ``DECODER_EXAMPLES=100000 pytest tests/unit/test_decoder_fuzz.py``.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqspipes_mp import Engine, Task
from sqspipes_mp.brokers.base import Handle, Received
from sqspipes_mp.errors import DecodeError, OutputError
from sqspipes_mp.messages.envelope import Encoder, Message, decode, outgoing_meta
from sqspipes_mp.messages.ids import hop_id, moved_id
from sqspipes_mp.messages.limits import MAX_BODY
from sqspipes_mp.pipeline.foreign_bodies import reader
from tests.gates import Log, bodies, dead, drain, engine_at, send

EXAMPLES = int(os.environ.get("DECODER_EXAMPLES", "250"))
fuzz = settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None)

# Surrogates, NUL and all the rest.
any_text = st.text(st.characters(codec=None), max_size=30)
numbers = st.integers() | st.integers(-(10**400), 10**400) | st.floats()
values = st.recursive(
    st.none() | st.booleans() | numbers | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=12,
)
names = st.sampled_from(["priority", "id", "hop", "x-user", "value", "meta", ""]) | any_text
metas = st.dictionaries(names, values, max_size=5) | values
envelopes = st.fixed_dictionaries({}, optional={"meta": metas, "value": values, "other": values})
raw_envelopes = envelopes.map(json.dumps) | st.builds(lambda e: json.dumps(e, ensure_ascii=False), envelopes)
literals = st.sampled_from(
    ["", " ", "{}", "[]", "null", "NaN", "-", "1e999", "-1E+999", "9" * 5000, '"\\ud800"', "\ufeff{}", "\x00", "{\x00}"]
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """An envelope with pieces cut out, put in, or doubled."""
    text = draw(raw_envelopes)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 10)))
        piece = draw(any_text | literals | st.sampled_from(['"', "\\", "}", "]", "{", ",", ":", "\\u", "\\ud83d"]))
        text = text[:start] + piece + text[start if draw(st.booleans()) else end :]
    return text


@st.composite
def nested(draw: st.DrawFn) -> str:
    """Brackets, far more than any parser follows, closed or not."""
    opening = draw(st.sampled_from(["[", '{"value":', '{"meta":', '[{"a":', '{"meta":{"x":[']))
    closing = {"[": "]", '{"value":': "}", '{"meta":': "}", '[{"a":': "}]", '{"meta":{"x":[': "]}}"}[opening]
    depth = draw(st.sampled_from([1, 10, 300, 990, 1_000, 5_000, 100_000]))
    inside = opening * depth + "1" + closing * draw(st.sampled_from([0, depth - 1, depth]))
    return draw(st.sampled_from(['{"value": %s}', '{"meta": %s, "value": 1}', "%s"])) % inside


raw_bodies = mutated() | raw_envelopes | any_text | literals | nested()


def foreign(body: str) -> Received:
    return Received(Handle("q", "r", "m"), body, 1, 0, None, 0.0)


def check(message: Message, ident: str) -> None:
    assert type(message.meta) is dict
    assert all(type(name) is str for name in message.meta)
    assert type(message.id) is str
    assert message.id
    assert type(message.parent) is str
    assert message.parent
    assert type(message.priority) is int
    assert message.priority >= 0
    if type(message.meta.get("id")) is not str or not message.meta["id"]:
        assert message.id == ident
    # What is made of it on its way on never fails either.
    hop = hop_id(message.parent, "stage", 0)
    assert len(hop) == len(moved_id(message.parent, "dead", ident)) == 64
    assert outgoing_meta(message, message.id, 3, hop).items() >= {"priority": 3, "id": message.id, "hop": hop}.items()


@fuzz
@given(raw_bodies, st.sampled_from(["m", "ïd"]))
def test_a_body_is_a_message_or_a_decode_error(body: str, ident: str) -> None:
    try:
        message = decode(body, ident)
    except DecodeError as error:
        assert error.body == body
        assert error.reason
        assert str(error)
    else:
        check(message, ident)


@fuzz
@given(raw_bodies)
def test_a_foreign_body_is_a_message_or_a_decode_error(body: str) -> None:
    try:
        message = reader(None)(foreign(body))
    except DecodeError as error:
        assert error.body == body
    else:
        assert message is not None
        assert (message.meta, message.id, message.parent, message.priority) == ({}, "m", "m", 0)


@fuzz
@given(envelopes)
def test_an_envelope_is_read_as_it_was_written(envelope: dict[str, Any]) -> None:
    body = json.dumps(envelope)
    if "value" not in envelope:
        with pytest.raises(DecodeError, match="no 'value'"):
            decode(body, "m")
        return
    message = decode(body, "m")
    assert json.dumps(message.value) == json.dumps(envelope["value"])
    meta = envelope.get("meta")
    assert json.dumps(message.meta) == json.dumps(meta if isinstance(meta, dict) else {})


@fuzz
@given(raw_bodies)
def test_what_was_read_can_be_sent_on_or_says_why_not(body: str) -> None:
    try:
        message = decode(body, "m")
    except DecodeError:
        return
    meta = outgoing_meta(message, message.id, 0, hop_id(message.parent, "s", 0))
    try:
        sent = Encoder("s", None).encode(message.value, meta)
    except OutputError as error:
        assert "stage 's'" in str(error)
        return
    assert sent.isascii()
    assert len(sent) <= MAX_BODY
    again = decode(sent, "other")
    assert (again.id, again.parent, again.priority) == (message.id, meta["hop"], 0)
    assert json.dumps(again.value) == json.dumps(message.value)


# --- the same in a real engine ---


def envelope(value: str = "1", meta: str = '{"priority": 0}') -> str:
    return f'{{"meta": {meta}, "value": {value}}}'


#: Not to be read, each with its own reason.
UNDECODABLE = [
    "",
    " ",
    "{}",
    "[]",
    "null",
    "true",
    "17",
    '"text"',
    "NaN",
    "-Infinity",
    '{"meta": {"priority": 0}}',
    '{"meta": {"priority": 0}, "Value": 1}',
    '{"value"}',
    '{"value": }',
    '{"value": 1',
    '{"value": 1}}',
    '{"value": 1} {"value": 2}',
    "{'value': 1}",
    '{"value": undefined}',
    '{"value": 01}',
    '{"value": "\t"}',
    '{"value": "\x00"}',
    '{"value": 1}\x00',
    "\x00",
    "\ufeff" + envelope(),
    '{"value": "\\ud8"}',
    '{"value": "\\x41"}',
    envelope("9" * 5_000),
    "[" * 1_000_000,
    "[" * 100_000 + "]" * 100_000,
    envelope("[" * 100_000 + "]" * 100_000),
    envelope(meta='{"x":' * 100_000 + "1" + "}" * 100_000),
    '{"value":' * 100_000 + "1" + "}" * 100_000,
    "<xml/>",
    'O:8:"stdClass":0:{}',
    "gAJ9cQBYBQAAAHZhbHVlcQFLAXMu",
    "é" * 300_000,
    "\U0001f600 ",
]
#: To be read; the last task gets the value.
PROCESSED = [
    envelope(),
    '{"value": null}',
    '{"value": 1, "meta": null}',
    '{"value": 1, "meta": []}',
    '{"value": 1, "meta": "text"}',
    '{"value": 1, "meta": 7}',
    '{"value": 1, "value": 2}',
    '{"other": 1, "value": 1}',
    '  {"value" :\r\n\t1 }  ',
    *(envelope(meta=f'{{"priority": {p}}}') for p in ("-1", "-99", "1", "15", "16", "1" + "0" * 4_000, "1e999", "0.5")),
    *(envelope(meta=f'{{"priority": {p}}}') for p in ('"9"', '""', "null", "true", "[]", "{}", "NaN", "-0")),
    *(
        envelope(meta=f'{{"id": {i}}}')
        for i in ("1", "null", '""', '"\\u0000"', '"\\ud800"', "[]", '"' + "i" * 9_000 + '"')
    ),
    *(
        envelope(meta=f'{{"hop": {h}}}')
        for h in ("1", "null", '""', '"\\u0000"', '"\\udfff"', "{}", '"' + "h" * 9_000 + '"')
    ),
    envelope(meta='{"x-user": "\\ud83d", "": {"": []}, "\\u0000": 0}'),
    envelope(meta="{" + ", ".join(f'"k{n}": {n}' for n in range(5_000)) + "}"),
    *(
        envelope(v)
        for v in ('""', '"\\u0000"', '"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"é\U0001f600\uffff"')
    ),
    *(envelope(v) for v in ("-0", "-0.0", "1e308", "5e-324", "9" * 4_000, "-" + "9" * 4_000, "false", "[]", "{}")),
    envelope("[" * 300 + "]" * 300),
    envelope('{"":' * 300 + "1" + "}" * 300),
    envelope('"' + "x" * 900_000 + '"'),
]
#: To be read, but JSON (RFC 8259) has no word for it on the way out.
UNSENDABLE = [envelope("NaN"), envelope("Infinity"), envelope("1e999"), envelope(meta='{"x": -Infinity}')]


def source() -> Any:
    yield from ()


def pass_on(value: object, log: Log) -> Any:
    log.note(os.getpid())
    return [value]


def end(value: object) -> None:
    return None


def engine_on(db: Path, log: Log) -> Engine:
    work = Task(pass_on, name="work", args=(log,))
    return engine_at(db, [source, work, Task(end, name="sink")], on_error="reject")


def test_no_body_takes_a_worker_down(db: Path, log: Log) -> None:
    engine = engine_on(db, log)
    sent = [*UNDECODABLE * 3, *PROCESSED * 3, *UNSENDABLE * 3]
    send(engine, "work", *sent)
    summary = drain(engine, "work", "sink")
    letters = dead(engine, "work")
    assert sorted(body for body, _ in letters) == sorted([*UNDECODABLE * 3, *UNSENDABLE * 3])
    for body, failure in letters:
        assert failure.error == ("DecodeError" if body in UNDECODABLE else "OutputError")
        assert failure.text
    # Nobody was charged or replaced: one process ran everything that could be read, each once.
    assert len(log.lines()) == 3 * (len(PROCESSED) + len(UNSENDABLE))
    assert len(set(log.lines())) == 1
    work, last = summary["work"], summary["sink"]
    assert (work.done, work.retried, work.dead) == (3 * len(PROCESSED), 0, len(letters))
    assert work.failed == 3 * len(UNSENDABLE)
    assert (last.done, last.failed, last.dead) == (3 * len(PROCESSED), 0, 0)
    assert bodies(engine, *engine.pipeline.stage("work").inputs, *engine.pipeline.stage("sink").inputs) == []


#: Read well, and then failing: what their letters carry is odd.
ODD_HOPS = {"surrogate": '"\\ud800"', "NUL": '"\\u0000"', "long": '"' + "h" * 9_000 + '"'}


@pytest.mark.parametrize("hop", ODD_HOPS.values(), ids=ODD_HOPS)
def test_a_message_with_an_odd_hop_can_be_dead_lettered(db: Path, log: Log, hop: str) -> None:
    body = envelope("NaN", f'{{"hop": {hop}, "id": {hop}}}')
    engine = engine_on(db, log)
    send(engine, "work", body)
    drain(engine, "work")
    assert [found for found, _ in dead(engine, "work")] == [body]
