import base64
import dataclasses
import datetime as dt
import enum
import functools
import hashlib
import json
import math
import pickle
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqspipes_mp.brokers.base import Handle, Received
from sqspipes_mp.errors import ConfigError, DecodeError, MessageTooLarge, OutputError
from sqspipes_mp.messages.attributes import MAX_ATTRIBUTES, Attribute, packed, size_of, unpacked
from sqspipes_mp.messages.envelope import Encoder, Message, clamp_priority, decode, envelope, outgoing_meta
from sqspipes_mp.messages.failure import Failure, failure_text, parse_failure
from sqspipes_mp.messages.ids import hop_id, moved_id, source_parent
from sqspipes_mp.messages.limits import FAILURE_ATTRIBUTE, MAX_BODY, MAX_BYTES
from sqspipes_mp.pipeline.foreign_bodies import reader, wants_attributes
from tests.gates import present

HOP = "0123456789abcdef" * 4


def foreign(body):
    return Received(Handle("q", "r", "m"), body, 1, 0, None, 0.0)


text = st.text(st.characters(), max_size=20)  # lone surrogates too
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text
)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(text, v, max_size=4), max_leaves=20)


def normal(value):
    """Two surrogates that form one character come back as it; JSON cannot tell them apart."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    if isinstance(value, list):
        return [normal(item) for item in value]
    if isinstance(value, dict):
        return {normal(key): normal(item) for key, item in value.items()}
    return value


@given(values)
def test_any_json_value_survives_the_wire(value):
    body = Encoder("s", None).encode(value, {"priority": 0})
    assert body.isascii()
    assert body.isprintable()
    back = decode(body, "m").value
    assert back == normal(value)
    assert repr(back) == repr(normal(value))  # 1 is no True, -0.0 no 0.0


@given(values, st.dictionaries(text, values, max_size=3), text)
def test_meta_travels_with_unknown_keys(value, meta, hop):
    message = decode(json.dumps({"meta": meta, "value": value}), "m")
    sent = outgoing_meta(message, message.id, 3, HOP)
    back = decode(Encoder("s", None).encode(value, sent), "other")
    assert {k: v for k, v in back.meta.items() if k not in ("priority", "id", "hop")} == {
        normal(k): normal(v) for k, v in meta.items() if k not in ("priority", "id", "hop")
    }
    assert (back.id, back.parent, back.priority) == (message.id, HOP, 3)


@given(st.text(max_size=200) | st.text('[]{}":,0123456789eE+-.naulftrsINy \\', max_size=60))
def test_decode_raises_decode_errors_only(body):
    for read in (decode, lambda b, m: reader(None)(foreign(b)), lambda b, m: reader(envelope)(foreign(b))):
        try:
            read(body, "m")
        except DecodeError as error:
            assert error.body == body


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("", "not JSON"),
        ("\ufeff{}", "not JSON"),
        ("{", "not JSON"),
        ('{"value": 1} x', "not JSON"),
        ("[" * 200_000, "deep"),
        ('{"value": ' + "1" * 5000 + "}", "not JSON"),
        ("[1]", "array"),
        ("1", "number"),
        ("true", "boolean"),
        ("null", "null"),
        ('"x"', "string"),
        ('{"meta": {}}', "no 'value'"),
        ("\ud800", "not JSON"),
    ],
)
def test_undecodable_bodies_say_why(body, word):
    with pytest.raises(DecodeError) as caught:
        decode(body, "m")
    assert word in caught.value.reason
    assert caught.value.body == body
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.reason, copy.body) == (caught.value.reason, body)


def test_nan_and_lone_surrogates_are_read():
    assert math.isnan(decode('{"value": NaN}', "m").value)
    assert decode('{"value": "\\ud800"}', "m").value == "\ud800"


@pytest.mark.parametrize("meta", ["null", "[]", "3", '"x"', "true"])
def test_meta_that_is_no_object_counts_as_empty(meta):
    message = decode(f'{{"meta": {meta}, "value": 5}}', "m-1")
    assert (message.value, message.meta, message.id, message.parent, message.priority) == (5, {}, "m-1", "m-1", 0)


@pytest.mark.parametrize(
    ("meta", "root", "parent"),
    [
        ({}, "m", "m"),
        ({"id": "r"}, "r", "r"),
        ({"id": "r", "hop": HOP}, "r", HOP),
        ({"hop": HOP}, "m", HOP),
        *(
            ({"id": "r", "hop": bad}, "r", "r")
            for bad in ("h", HOP.upper(), HOP[:-1], HOP + "0", HOP + "\n", " " + HOP)
        ),
        ({"id": "", "hop": ""}, "m", "m"),
        ({"id": 7, "hop": ["x"]}, "m", "m"),
    ],
)
def test_ids_come_from_meta_else_from_the_broker(meta, root, parent):
    message = decode(json.dumps({"meta": meta, "value": None}), "m")
    assert (message.id, message.parent) == (root, parent)
    assert message.meta == meta


@pytest.mark.parametrize(
    ("sent", "read"), [(3, 3), (0, 0), (-1, 0), (10**30, 10**30), (True, 0), (2.0, 0), ("2", 0), (None, 0), ([], 0)]
)
def test_priority_is_an_int_from_zero(sent, read):
    priority = decode(json.dumps({"meta": {"priority": sent}, "value": 1}), "m").priority
    assert priority == read
    assert type(priority) is int


def test_foreign_bodies_go_through_decode():
    message = reader(str.upper)(foreign("not json"))
    assert (message.value, message.meta, message.id, message.parent) == ("NOT JSON", {}, "m", "m")
    assert reader(lambda body: None)(foreign("anything")) is None
    with pytest.raises(KeyError):
        reader(lambda body: json.loads(body)["gone"])(foreign("{}"))


@pytest.mark.parametrize(
    "body",
    [
        '{"Records": [1]}',
        "[1]",
        "null",
        '{"value": 3, "unit": "kg"}',
        '{"meta": {"id": "sensor-17"}, "value": 3}',
        json.dumps({"meta": {"id": "r", "hop": HOP, "priority": 2}, "value": 3}),
    ],
)
def test_foreign_json_is_the_value_whatever_it_looks_like(body):
    message = reader(None)(foreign(body))
    assert message == Message(json.loads(body), {}, "m", "m", 0)


def test_foreign_text_needs_a_decode():
    with pytest.raises(DecodeError, match="decode="):
        reader(None)(foreign("plain text"))


def test_envelopes_in_a_foreign_queue_are_honoured_on_request():
    body = json.dumps({"meta": {"id": "r", "hop": HOP, "priority": 2, "x": 1}, "value": 3})
    one, two = lambda text: envelope(text), lambda text, attributes: envelope(text)  # noqa: PLW0108  (a parameter each)
    for wanted in (envelope, one, two):
        assert reader(wanted)(foreign(body)) == decode(body, "m")
    # None is a value where the envelope says so, and no word of decode's.
    assert reader(envelope)(foreign('{"value": null}')) == Message(None, {}, "m", "m", 0)
    for bad in ("[1]", "{}", "text"):
        with pytest.raises(DecodeError):
            reader(envelope)(foreign(bad))


def both(body, attributes):
    return [body, attributes]


def one_of_its_own(body, encoding="utf-8"):
    return [body, encoding]


class Both:
    def __call__(self, body, attributes):
        return [body, attributes]

    def bound(self, body, attributes):
        return [body, attributes]


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (both, True),
        (Both(), True),
        (Both().bound, True),
        (functools.partial(both), True),
        (lambda body, attributes, /: [body, attributes], True),
        (lambda body, attributes, more=1: [body, attributes], True),
        (functools.partial(both, attributes="mine"), False),
        (one_of_its_own, False),
        (lambda body, *rest: [body, rest], False),
        (lambda body, *, attributes=None: [body, attributes], False),
        (str.upper, False),
        (json.loads, False),
        (dict, False),
    ],
)
def test_attributes_are_given_to_what_requires_two(function, wanted):
    assert wants_attributes(function) is wanted
    if wanted:
        told = (Attribute("colour", "String", "blue"), Attribute("raw", "Binary.x", b"\0"))
        received = dataclasses.replace(foreign("x"), attributes=told)
        assert reader(function)(received).value == ["x", {"colour": "blue", "raw": b"\0"}]


class Colour(enum.IntEnum):
    RED = 1


class Point(NamedTuple):
    x: int
    y: int


def test_what_json_dumps_takes_is_taken():
    encode = Encoder("s", None).encode
    assert decode(encode((1, Point(1, 2), Colour.RED), {}), "m").value == [1, [1, 2], 1]
    repeated = {1: "a", None: "b", True: "c", 1.5: "d"}  # noqa: F601  (a key of True is one of 1)
    assert decode(encode(repeated, {}), "m").value == {
        "1": "c",
        "null": "b",
        "1.5": "d",
    }


def test_the_body_is_compact_with_meta_first():
    assert Encoder("s", None).encode([1, "é"], {"priority": 0}) == '{"meta":{"priority":0},"value":[1,"\\u00e9"]}'


def numpy_like(name, item, shape=(), dtype="int64"):
    kind = type(name, (), {"__module__": "numpy", "shape": shape, "dtype": dtype, "item": lambda self: item})
    return kind()


@pytest.mark.parametrize("item", [3, 2.5, True, "x"])
def test_numpy_scalars_need_no_default(item):
    assert decode(Encoder("s", None).encode({"n": [numpy_like("int64", item)]}, {}), "m").value == {"n": [item]}


@pytest.mark.parametrize(
    "odd",
    [
        numpy_like("ndarray", 3, shape=(1,)),
        numpy_like("datetime64", 1577836800, dtype="datetime64[ns]"),
        numpy_like("complex128", 1j),
        numpy_like("longdouble", numpy_like("longdouble", 1)),
    ],
    ids=lambda o: type(o).__name__,
)
def test_numpy_values_that_would_change_are_refused(odd):
    with pytest.raises(OutputError, match=rf"value\['n'\] is a numpy\.{type(odd).__name__}"):
        Encoder("s", None).encode({"n": odd}, {})


def test_the_users_default_comes_after_numpy():
    encoder = Encoder("s", lambda o: base64.b64encode(o).decode() if isinstance(o, bytes) else {"set": sorted(o)})
    value = decode(encoder.encode([b"x", {2, 1}, numpy_like("int64", 3)], {}), "m").value
    assert value == ["eA==", {"set": [1, 2]}, 3]


def cyclic():
    inner: dict[str, Any] = {}
    inner["back"] = [inner]
    return {"a": inner}


def nested(depth):
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@dataclasses.dataclass
class Thing:
    x: int = 1


class Opaque:
    def __repr__(self):
        raise RuntimeError("no repr")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [0, 1, 2, {5}]}, ["value['a'][3] is a set", "sorted(it)", "a dict"]),
        (b"raw", ["value is a bytes", "base64", "S3"]),
        ([float("nan")], ["value[0] is nan", "None"]),
        ({"k": (1, float("-inf"))}, ["value['k'][1] is -inf"]),
        (cyclic(), ["value['a']['back'][0] contains itself"]),
        ([{(1, 2): 3}], ["value[0] has a key that is a tuple, (1, 2)", "str"]),
        ({float("nan"): 1}, ["the key nan"]),
        ({"n": 10**6000}, ["value['n'] is an int of 19,932 bits", "hex"]),
        (nested(100_000), ["nested too deeply"]),
        ((n for n in ()), ["value is a generator", "yield"]),  # type: ignore[var-annotated]
        ([Thing()], ["value[0] is a", "Thing", "dataclasses.asdict"]),
        ({"d": dt.date(2026, 1, 1)}, ["value['d'] is a datetime.date", "isoformat()"]),
        ({"o": Opaque()}, ["value['o'] is a", "Opaque", "json_default"]),
        ({"e": ValueError("x")}, ["value['e'] is a ValueError", "Raise it"]),
        ([[0] * 300_000, {1}], ["something in it is a set"]),
    ],
    ids=range(15),
)
def test_what_json_cannot_say_is_named_with_place_and_cure(value, words):
    with pytest.raises(OutputError) as caught:
        Encoder("resize", None).encode(value, {})
    for word in ["stage 'resize'", *words]:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 600
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_culprits_in_meta_are_not_blamed_on_the_value():
    with pytest.raises(OutputError, match=r"meta\['x-rate'\] is nan"):
        Encoder("s", None).encode(1, decode('{"meta": {"x-rate": NaN}, "value": 1}', "m").meta)


def test_a_failing_default_is_the_cause_and_the_culprit_is_not_kept():
    def default(o):
        raise KeyError("nope")

    with pytest.raises(OutputError, match=r"value\[0\] is a .*Thing.*json_default: KeyError: 'nope'") as caught:
        Encoder("s", default).encode([Thing()], {})
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.__context__ is None


def test_a_default_that_never_ends_is_an_output_error():
    with pytest.raises(OutputError, match="Circular"):
        Encoder("s", lambda o: o).encode(Thing(), {})
    with pytest.raises(OutputError):
        Encoder("s", lambda o: [Thing()]).encode(Thing(), {})


def test_size_is_limited_to_the_byte():
    encoder = Encoder("resize", None)
    free = MAX_BODY - len(encoder.encode("", {"priority": 0}))
    assert len(encoder.encode("x" * free, {"priority": 0})) == MAX_BODY
    with pytest.raises(MessageTooLarge, match=r"stage 'resize'.*a str.*1,032,193 bytes.*1,032,192.*S3"):
        encoder.encode("x" * (free + 1), {"priority": 0})


def test_outgoing_meta_leaves_the_input_alone():
    message = decode('{"meta": {"id": "r", "x-a": 1, "priority": 9}, "value": 1}', "m")
    assert outgoing_meta(message, "r", 2, "h") == {"id": "r", "x-a": 1, "priority": 2, "hop": "h"}
    assert message.meta == {"id": "r", "x-a": 1, "priority": 9}
    assert outgoing_meta(None, "r", 0, "h") == {"id": "r", "priority": 0, "hop": "h"}


def test_hop_ids_are_the_documented_hash():
    assert hop_id("p", "resize", 12) == hashlib.sha256(b"p\nresize\n12").hexdigest()
    assert moved_id("h", "dead", "m") == hashlib.sha256(b"h\ndead\nm").hexdigest()
    assert len({moved_id("h", kind, m) for kind in ("dead", "redrive") for m in "ab"} | {"h"}) == 5


def test_ids_of_others_with_lone_surrogates_still_hash():
    message = decode('{"meta": {"id": "\\ud800"}, "value": 1}', "m")
    assert len(hop_id(message.parent, "s", 0)) == 64


def test_source_parents_are_unique():
    calls = [(run, slot, call) for run in ("a", "b") for slot in ("1", "11", "0:1") for call in (0, 1, 11)]
    assert len({source_parent(*call) for call in calls}) == len(calls)


@pytest.mark.parametrize(("given_", "level"), [(-3, 0), (0, 0), (2, 2), (3, 2), (10**30, 2), (True, 1)])
def test_priorities_are_clamped_to_the_levels(given_, level):
    assert clamp_priority(given_, 3) == level


@pytest.mark.parametrize("bad", [None, 1.5, "2"])
def test_priorities_that_are_no_ints_are_refused(bad):
    with pytest.raises(ConfigError, match="priority must be an int"):
        clamp_priority(bad, 3)


long_text = st.text(st.characters(), max_size=60).map(lambda s: s * 400) | text
failures = st.fixed_dictionaries(
    {"error": st.text(min_size=1, max_size=30)},
    optional={
        "text": long_text,
        "traceback": long_text,
        "stack": long_text,
        "stage": text,
        "attempts": st.integers(),
        "signal": st.none() | st.just("SIGKILL"),
        "host": long_text,
        "pid": st.none() | st.integers(),
        "first_seen": st.none() | st.floats(),
        "failed_at": st.none() | st.floats(),
        "source": text,
        "extra": st.binary() | long_text,
    },
)
bodies = st.integers(0, MAX_BYTES + 10) | st.integers(MAX_BYTES - 17_000, MAX_BYTES)


@given(failures, bodies)
def test_failure_text_fits_and_reads_back(failure, body_bytes):
    written = failure_text(failure, body_bytes)
    if written is None:
        assert body_bytes > MAX_BODY
        return
    assert written.isascii()
    assert body_bytes + len(FAILURE_ATTRIBUTE) + len("String") + len(written) <= MAX_BYTES
    assert len(FAILURE_ATTRIBUTE) + len("String") + len(written) <= MAX_BYTES - MAX_BODY
    back = parse_failure(written)
    assert back.error
    assert back.error == normal(failure["error"]) or body_bytes > MAX_BODY


attributes = st.lists(
    st.builds(
        Attribute, st.text(min_size=1, max_size=30), st.sampled_from(["String", "Number.int"]), st.text(max_size=50)
    )
    | st.builds(Attribute, st.text(min_size=1, max_size=30), st.just("Binary.png"), st.binary(max_size=50)),
    max_size=MAX_ATTRIBUTES,
)


@given(attributes)
def test_attributes_survive_shared_memory(told):
    assert unpacked(packed(told)) == tuple(told)


@given(failures, st.integers(MAX_BYTES - 40_000, MAX_BYTES), attributes)
def test_failure_text_fits_beside_the_sender_s_attributes(failure, body_bytes, told):
    written = failure_text(failure, body_bytes, told)
    if len(told) == MAX_ATTRIBUTES:
        assert written is None
    elif written is not None:
        whole = body_bytes + size_of(told) + len(FAILURE_ATTRIBUTE) + len("String") + len(written)
        assert whole <= MAX_BYTES


def full_failure(**changes):
    return Failure(
        **{
            "error": "ValueError",
            "text": "bad",
            "traceback": "Traceback",
            "stage": "resize",
            "attempts": 5,
            "signal": "SIGSEGV",
            "stack": "Thread 1",
            "host": "h",
            "pid": 7,
            "first_seen": 1.5,
            "failed_at": 2.5,
            "source": "q",
            **changes,
        }
    )


def test_a_short_failure_is_kept_whole():
    failure = full_failure()
    assert parse_failure(present(failure_text(dataclasses.asdict(failure), MAX_BODY))) == failure


def test_long_tracebacks_lose_their_middle_and_nothing_else():
    failure = full_failure(traceback="first line\n" + "☃" * 100_000 + "\nlast line")
    back = parse_failure(present(failure_text(dataclasses.asdict(failure), 0)))
    assert back.traceback.startswith("first line\n")
    assert back.traceback.endswith("\nlast line")
    assert "characters cut" in back.traceback
    assert dataclasses.replace(back, traceback="") == dataclasses.replace(failure, traceback="")


def test_a_long_stack_does_not_push_the_traceback_out():
    failure = full_failure(traceback="T" * 50_000, stack="S" * 50_000, text="x" * 50_000)
    back = parse_failure(present(failure_text(dataclasses.asdict(failure), 0)))
    assert min(len(back.traceback), len(back.stack)) > 1_500
    assert len(back.text) > 900


def test_beside_a_full_body_nothing_is_written():
    assert failure_text(dataclasses.asdict(full_failure()), MAX_BYTES) is None
    assert failure_text(dataclasses.asdict(full_failure()), MAX_BYTES - 40) is None
    tight = failure_text(dataclasses.asdict(full_failure()), MAX_BYTES - 29 - 30)
    assert parse_failure(present(tight)).error == "ValueError"


@given(st.text(max_size=50) | values.map(json.dumps))
def test_parse_failure_never_raises(written):
    assert isinstance(parse_failure(written), Failure)


def test_parse_failure_is_tolerant():
    assert parse_failure("garbage") == Failure(error="unknown", text="garbage")
    assert parse_failure('{"error": "E", "pid": "x", "attempts": true, "new": 1}') == Failure(error="E")


def test_a_value_that_was_passed_in_is_to_be_given_otherwise() -> None:
    with pytest.raises(OutputError, match=r"the value \(a list\).*Give a") as fed:
        Encoder(None, None).encode([object()], {})
    assert "Return" not in str(fed.value)
    with pytest.raises(OutputError, match="Return a"):
        Encoder("work", None).encode([object()], {})
