import logging

import pytest

from sqspipes_mp.brokers.sqlite import SQLite
from sqspipes_mp.brokers.sqs import SQS
from sqspipes_mp.brokers.url import parse, resolve
from sqspipes_mp.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "region", "endpoint"),
    [
        ("sqs://", None, None),
        ("sqs://us-west-2", "us-west-2", None),
        ("SQS://us-west-2", "us-west-2", None),
        ("sqs://us-west-2?endpoint_url=http://127.0.0.1:5000", "us-west-2", "http://127.0.0.1:5000"),
        ("sqs://?endpoint_url=http%3A%2F%2Flocalhost%3A9324", None, "http://localhost:9324"),
    ],
)
def test_sqs_urls(url: str, region: str | None, endpoint: str | None) -> None:
    broker = parse(url)
    assert isinstance(broker, SQS)
    assert (broker.region, broker.endpoint_url, broker.access_key) == (region, endpoint, None)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///work.db", "work.db"),
        ("sqlite:///data/work.db", "data/work.db"),
        ("sqlite:////var/lib/work.db", "/var/lib/work.db"),
        ("sqlite:///a%20b%23.db", "a b#.db"),
        ("sqlite://", None),
    ],
)
def test_sqlite_urls(url: str, path: str | None) -> None:
    broker = parse(url)
    assert isinstance(broker, SQLite)
    assert broker.path == path


@pytest.mark.parametrize(
    ("url", "cure"),
    [
        ("", "sqs://"),
        ("work.db", "sqlite:///relative.db"),
        ("redis://localhost", "sqs://"),
        ("sqlit:///work.db", r"Did you mean sqlite://\?"),
        ("sqs:us-west-2", "with // after"),
        ("sqlite:work.db", "with // after"),
        ("sqs://us-west-2/queue", "without a path"),
        ("sqs:///us-west-2", "without a path"),
        ("sqs://127.0.0.1:5000", r"endpoint_url=http://127\.0\.0\.1:5000"),
        ("sqs://us-west-2?endpoint=http://localhost", r"Did you mean endpoint_url\?"),
        ("sqs://us-west-2?tags=1", r"SQS\(\.\.\.\)"),
        ("sqs://?endpoint_url=", "once, with a value"),
        ("sqs://?endpoint_url=http://a&endpoint_url=http://b", "once, with a value"),
        ("sqs://?endpoint_url=localhost:5000", "an http or https URL"),
        ("sqs://us west", "region name"),
        ("sqs://us-west-2#x", "%23"),
        ("sqlite://work.db", "sqlite:///work.db"),
        ("sqlite://host/work.db", "sqlite:///host/work.db"),
        ("sqlite:///", "path of a file"),
        ("sqlite:////", "path of a file"),
        ("sqlite:///:memory:", "a file to share"),
        ("sqlite:///work.db?timeout=3", "takes no options"),
        ("sqs://[", "sqs://REGION"),
    ],
)
def test_bad_urls_say_the_cure(url: str, cure: str) -> None:
    with pytest.raises(ConfigError, match=cure):
        parse(url)


@pytest.mark.parametrize(
    "url",
    [
        "sqs://KEYID:hunter2@us-west-2",
        "sqs://hunter2@us-west-2",
        "sqs://us-west-2?secret_key=hunter2",
        "sqs://us-west-2?endpoint_url=http://u:hunter2@localhost",
        "sqlite://u:hunter2@host/work.db",
        "redis://u:hunter2@host",
        *(
            form.format(f"{mark}hunter2")
            for mark in "/?#:@[&=% ;"
            for form in (
                "sqs://KEYID:x{}@us-west-2",
                "sqs:KEYID:x{}@us-west-2",
                "KEYID:x{}@us-west-2",
                "sqs://us-west-2?endpoint_url=http://u:x{}@localhost",
                "sqs://us-west-2?endpoint_url=http://a&endpoint_url=http://u:x{}@localhost",
                "sqlite://u:x{}@host/work.db",
                "redis://u:x{}@host",
            )
        ),
        "sqs://KEYID:hunter2",
        "sqs://us-west-2?endpoint_url=http://localhost?token=hunter2",
    ],
)
def test_secrets_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(url)
    assert "hunter2" not in str(caught.value) + repr(caught.value.__dict__)


def test_argument_wins_over_the_environment_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    broker = SQS("us-west-2")
    environ = {"SQSPIPES_BROKER": "sqlite:///work.db"}
    assert resolve(broker, "d", environ) is broker
    found = resolve("sqs://eu-west-1", "d", environ)
    assert isinstance(found, SQS)
    assert found.region == "eu-west-1"
    assert [message.partition(" is set and has no effect")[0] for message in caplog.messages] == [
        "d: SQSPIPES_BROKER"
    ] * 2


def test_argument_and_environment_that_agree_are_nothing_to_warn_of(caplog: pytest.LogCaptureFixture) -> None:
    resolve(SQS("us-west-2"), "d", {"SQSPIPES_BROKER": "sqs://us-west-2"})
    resolve("sqlite:///work.db", "d", {"SQSPIPES_BROKER": "sqlite:///work.db"})
    assert caplog.messages == []


def test_environment_wins_over_the_default(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(resolve(None, "d", {"SQSPIPES_BROKER": "sqs://us-west-2"}), SQS)
    assert caplog.messages == []


def test_default_is_a_file_and_one_warning_that_names_it(caplog: pytest.LogCaptureFixture) -> None:
    ambient = {"AWS_REGION": "us-west-2", "AWS_ACCESS_KEY_ID": "x", "SQSPIPES_BROKER": ""}
    with caplog.at_level(logging.WARNING):
        broker = resolve(None, "shop", ambient)
    assert isinstance(broker, SQLite)
    assert broker.path == "./shop.db"
    assert len(caplog.messages) == 1
    assert "./shop.db" in caplog.messages[0]
    assert "sqs://us-west-2" in caplog.messages[0]


def test_bad_url_in_the_environment_says_where_it_is() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(None, "d", {"SQSPIPES_BROKER": "nonsense"})
    assert "SQSPIPES_BROKER" in caught.value.__notes__[0]


@pytest.mark.parametrize("broker", [SQS, SQLite, 5, object(), b"sqs://"])
def test_anything_else_is_no_broker(broker: object) -> None:
    with pytest.raises(ConfigError, match="broker must be"):
        resolve(broker, "d", {})


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqs:/us-west-2", "'sqs:/us-west-2'"),
        ("sqs:us-west-2?secret=1", "'sqs:us-west-2'"),
        ("sqs:id:secret@us-west-2", "'sqs:...@us-west-2'"),
    ],
)
def test_a_url_without_slashes_is_shown_as_typed_but_for_secrets(url: str, shown: str) -> None:
    with pytest.raises(ConfigError, match="with // after sqs:") as caught:
        parse(url)
    assert shown in str(caught.value)
    assert "secret" not in str(caught.value)


PASSWORDS = [
    "hunter2",
    "hun:hunter2",
    "a/hunter2",
    "a?hunter2",
    "a#hunter2",
    "a@hunter2",
    "hunter2@b",
    "a%40hunter2",
    "[hunter2",
    "hunter2]",
    " hunter2",
    "\nhunter2",
    "a\\hunter2",
    "hunter2/x:y",
]


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize(
    "form",
    [
        "sqs://key:{}@us-west-2",
        "sqs:key:{}@us-west-2",
        "sqs://us-west-2?endpoint_url=http://key:{}@host.test:9",
        "sqs://us-west-2?secret_key={}",
        "sqs://us-west-2?endpoint_url=http://h?token={}",
        "sqs://k:{}",
        "//k:{}@h.test",
        "redis://:{}@host.test/0",
        "https://k:{}@sqs.us-west-2.amazonaws.com",
        "amqp://k:{}@h.test:99999/",
    ],
)
def test_no_secret_of_a_url_is_shown_whatever_characters_it_has(form: str, password: str) -> None:
    told: list[object] = []
    try:
        broker = parse(form.format(password))
        told += [repr(broker), broker.describe()]
    except ConfigError as error:
        told += [error, error.__dict__, error.__cause__, error.__context__]
    assert "hunter2" not in " ".join(map(str, told))


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize(
    "form", ["http://key:{}@host.test:9", "http://h.test/?t={}", "http://h/#{}", "http://k:{}@h:bad"]
)
def test_no_secret_of_an_endpoint_is_shown(form: str, password: str) -> None:
    with pytest.raises(ConfigError, match="endpoint_url") as caught:
        SQS("us-west-2", endpoint_url=form.format(password))
    told = [caught.value, caught.value.__dict__, caught.value.__cause__, caught.value.__context__]
    assert "hunter2" not in " ".join(map(str, told))
