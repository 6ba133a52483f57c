"""The HTTP process's decisions: who may see what, counters that never go back, addresses."""

from typing import Any

import pytest

from sqspipes_mp import ConfigError
from sqspipes_mp.observer.access import Access, Sight, numbers_only
from sqspipes_mp.observer.metrics import METRICS, Totals
from sqspipes_mp.pipeline.http_address import parse_address


def test_without_a_token_loopback_shows_numbers_and_other_interfaces_metrics() -> None:
    for host, seen in (("127.0.0.1", Sight.NUMBERS), ("::1", Sight.NUMBERS), ("::", Sight.METRICS)):
        access = Access(host, None)
        # Nothing is a right token where there is none.
        assert access.sight(None) is seen
        for given in ("", "Bearer", "Bearer ", "Bearer None"):
            assert access.sight(given) is seen


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer ", "Bearer x", "bearer  secret x", "Basic secret", "secret"])
def test_a_wrong_token_is_refused(given: str) -> None:
    access = Access("10.0.0.1", "secret")
    assert access.sight(given) is Sight.REFUSED
    assert access.sight("Bearer secret") is access.sight("bearer secret ") is Sight.ALL
    assert access.sight(None) is Sight.METRICS


def test_loopback_takes_its_own_names_alone() -> None:
    access = Access("127.0.0.1", None)
    for host in ("localhost", "localhost:80", "127.0.0.1", "127.1.2.3:9", "[::1]", "[::1]:80", " LocalHost:1 "):
        assert access.takes(host), host
    assert not access.takes(None)
    for host in (
        "",
        "x",
        "localhost.",
        "localhost.evil",
        "127.0.0.1.evil",
        "2130706433",
        "[::1",
        "[::1]x",
        "::1",
    ):
        assert not access.takes(host), host
    assert Access("10.0.0.1", None).takes("anything")


def test_numbers_have_no_text_that_is_not_in_the_metrics_too() -> None:
    state: dict[str, Any] = {
        "engine": {"run": "r", "pid": 5, "domain": "d", "why": "w", "live": True, "target": "m:e", "new text": "x"},
        "stages": [{"name": "work", "done": 3, "queues": [{"priority": 0, "waiting": None}]}],
        "workers": [{"pid": 6, "stage": "work", "calls": [{"id": "i", "age": 1.5, "text": "t", "fraction": None}]}],
    }
    assert numbers_only(state) == {
        "engine": {"domain": "d", "why": "w", "live": True},
        "stages": [{"name": "work", "done": 3, "queues": [{"priority": 0, "waiting": None}]}],
        "workers": [{"stage": "work", "calls": [{"age": 1.5, "fraction": None}]}],
    }


def test_counters_never_go_back() -> None:
    totals = Totals()
    done, failed = ("done", ("d",)), ("failed", ("d",))
    totals.take("one", [(done, 5), (failed, 2)])
    # Two words that belong together were read between their two writes.
    totals.take("one", [(done, 4), (failed, 3)])
    assert totals.sums() == {done: 5, failed: 3}
    totals.take("two", [(done, 10)])
    totals.end("one")
    assert totals.sums() == {done: 15, failed: 3}
    totals.take("three", [(done, 1)])
    totals.end("two")
    totals.end("three")
    assert totals.sums() == {done: 16, failed: 3}


def test_no_metric_has_a_label_of_unbounded_values() -> None:
    allowed = {"domain", "stage", "outcome", "reason", "state", "priority", "operation", "kind"}
    for metric in METRICS:
        assert metric.kind == "info" or set(metric.labels) <= allowed, metric.name
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
    assert len({metric.name for metric in METRICS}) == len(METRICS)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8090", "127.0.0.1", 8090),
        (":0", "", 0),
        ("[::1]:80", "::1", 80),
        ("a.b:65535", "a.b", 65535),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    found = parse_address("x", text)
    assert (found.host, found.port) == (host, port)


@pytest.mark.parametrize(
    "text",
    ["8090", "localhost", "localhost:", "h:-1", "h:65536", "::1:80", "a b:1", ":\u0661", "", None, 8090, "[]x:1"],
)
def test_what_is_no_address(text: object) -> None:
    with pytest.raises(ConfigError, match="x must be HOST:PORT"):
        parse_address("x", text)
