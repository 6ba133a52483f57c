import contextlib
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from sqspipes_mp.brokers.base import QueueSpec
from sqspipes_mp.brokers.sqs import SQS
from sqspipes_mp.errors import BrokerError, ConfigError


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No AWS settings but a config file of the test's own, and no way to ask the network for credentials."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return tmp_path


def fresh(program: str, *args: str) -> str:
    """Run a program in an interpreter of its own; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *args], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: SQS(5), "region"),  # type: ignore[arg-type]
        (lambda: SQS(""), "region"),
        (lambda: SQS("US West"), "region"),
        (lambda: SQS(endpoint_url=5), "endpoint_url"),  # type: ignore[arg-type]
        (lambda: SQS(endpoint_url="localhost:5000"), "endpoint_url"),
        (lambda: SQS(endpoint_url="ftp://localhost"), "endpoint_url"),
        (lambda: SQS(endpoint_url="http://"), "endpoint_url"),
        (lambda: SQS(endpoint_url="http://localhost:99999"), "endpoint_url"),
        (lambda: SQS(endpoint_url="http://u:hunter2@localhost"), "endpoint_url"),
        (lambda: SQS(access_key="a"), "secret_key"),
        (lambda: SQS(secret_key="hunter2"), "access_key"),
        (lambda: SQS(access_key="", secret_key="hunter2"), "access_key"),
        (lambda: SQS(access_key="a", secret_key=b"hunter2"), "secret_key"),  # type: ignore[arg-type]
        (lambda: SQS(session="prod"), "session"),  # type: ignore[arg-type]
        (lambda: SQS(session=lambda: None, access_key="a", secret_key="hunter2"), "session"),
        (lambda: SQS(retention=59), "retention"),
        (lambda: SQS(retention=1_209_601), "retention"),
        (lambda: SQS(retention=60.5), "retention"),  # type: ignore[arg-type]
        (lambda: SQS(retention=True), "retention"),
        (lambda: SQS(kms_key=""), "kms_key"),
        (lambda: SQS(tags=["a"]), "tags"),  # type: ignore[arg-type]
        (lambda: SQS(tags={"a": 1}), "tags"),  # type: ignore[dict-item]
        (lambda: SQS(tags={"": "x"}), "tags"),
        (lambda: SQS(tags={str(n): "x" for n in range(51)}), "tags"),
    ],
)
def test_bad_value_names_its_field_and_no_secret(make: Callable[[], SQS], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert field in caught.value.field
    assert caught.value.cure
    assert "hunter2" not in str(caught.value)


def test_neither_repr_nor_describe_nor_errors_show_keys() -> None:
    broker = SQS("us-west-2", endpoint_url="http://localhost:1", access_key="AKIAX", secret_key="hunter2")
    shown = repr(broker) + broker.describe()
    assert "us-west-2" in shown
    assert "http://localhost:1" in shown
    assert "hunter2" not in shown
    assert "AKIAX" not in shown


def test_pickles_whole() -> None:
    broker = SQS("us-west-2", access_key="a", secret_key="b", retention=60, tags={"t": "v"})
    copy = pickle.loads(pickle.dumps(broker))
    assert (copy.region, copy.secret_key, copy.retention, copy.tags) == ("us-west-2", "b", 60, {"t": "v"})


def test_tags_are_copied() -> None:
    tags = {"a": "b"}
    broker = SQS(tags=tags)
    tags["c"] = "d"
    assert broker.tags == {"a": "b"}


def test_no_region_says_how_to_set_it() -> None:
    with pytest.raises(ConfigError, match="AWS_REGION"):
        SQS().check()
    with pytest.raises(ConfigError, match="AWS_REGION"):
        SQS(access_key="a", secret_key="b").open()


@pytest.mark.parametrize("variable", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_region_of_the_environment(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "eu-west-1")
    broker = SQS(access_key="a", secret_key="b")
    broker.check()
    connection = broker.open()
    assert "eu-west-1" in connection._calls.clients.endpoint
    connection.close()


def test_region_of_the_profile(monkeypatch: pytest.MonkeyPatch, bare: Path) -> None:
    (bare / "config").write_text("[profile shop]\nregion = eu-central-1\n")
    monkeypatch.setenv("AWS_PROFILE", "shop")
    SQS().check()


def test_missing_profile_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nowhere")
    with pytest.raises(ConfigError, match=r"nowhere.*AWS_PROFILE"):
        SQS("us-west-2").check()


def test_malformed_endpoint_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", "not a url")
    with pytest.raises(ConfigError, match="not a url"):
        SQS("us-west-2").check()


def test_no_credentials_says_how_to_set_them() -> None:
    with pytest.raises(ConfigError, match="AWS_ACCESS_KEY_ID") as caught:
        SQS("us-west-2").open()
    assert "emulator" not in str(caught.value)


def test_no_credentials_for_an_emulator_says_any_pair_will_do() -> None:
    with pytest.raises(ConfigError, match="An emulator takes any pair"):
        SQS("us-west-2", endpoint_url="http://127.0.0.1:5000").open()


def test_half_a_pair_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    with pytest.raises(ConfigError, match="AWS configuration"):
        SQS("us-west-2").open()


def test_session_gives_region_and_credentials() -> None:
    def session() -> Any:
        return boto3.Session("a", "b", region_name="ap-south-1")

    broker = SQS(session=session)
    broker.check()
    connection = broker.open()
    assert "ap-south-1" in connection._calls.clients.endpoint
    connection.close()


@pytest.mark.parametrize("made", [None, "prod"])
def test_session_that_is_none_is_a_configuration_error(made: object) -> None:
    with pytest.raises(ConfigError, match=r"boto3\.Session"):
        SQS("us-west-2", session=lambda: made).open()


def test_naming_sqs_imports_no_boto3() -> None:
    program = """
        import sys
        from sqspipes_mp.brokers.sqs import SQS
        from sqspipes_mp.brokers.url import parse
        parse("sqs://us-west-2?endpoint_url=http://localhost:1")
        print([name for name in sys.modules if name.startswith(("boto", "urllib3"))])
    """
    assert fresh(program) == "[]"


def test_check_and_warm_open_no_socket_and_children_share_what_was_loaded() -> None:
    program = """
        import sys
        opened = []
        def audit(event, args):
            if event.startswith("socket.") and event != "socket.gethostname":
                print(event, args); sys.stdout.flush()
            if event == "open" and "botocore/data/" in str(args[0]):
                opened.append(args[0])
        import botocore.session, socket
        sys.addaudithook(audit)
        from sqspipes_mp.brokers.sqs import SQS
        broker = SQS("us-west-2", access_key="a", secret_key="b")
        broker.check()
        broker.warm()
        assert opened
        opened.clear()
        connection = broker.open()
        print(opened)
    """
    assert fresh(program) == "[]"


def test_describe_tells_the_endpoint_that_the_environment_or_a_profile_chooses(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = SQS("us-west-2")
    broker.check()
    assert broker.describe() == "SQS (us-west-2)"
    (bare / "config").write_text(
        "[default]\nregion = eu-west-1\nservices = mine\n[services mine]\nsqs =\n  endpoint_url = http://127.0.0.1:7\n"
    )
    broker = SQS()
    broker.check()
    assert broker.describe() == "SQS (eu-west-1 at http://127.0.0.1:7)"
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", "http://user:hunter2@127.0.0.1:1")
    assert SQS("us-west-2").describe() == "SQS (us-west-2 at http://...@127.0.0.1:1)"


@pytest.mark.parametrize("lean", [True, False])
def test_a_password_in_the_environments_endpoint_is_shown_nowhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lean: bool
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", "http://user:hunter2@127.0.0.1:1")
    broker = SQS("us-west-2", access_key="a", secret_key="b", lean=lean)
    with caplog.at_level("DEBUG", "sqspipes_mp"), contextlib.closing(broker.open()) as connection:
        monkeypatch.setattr(connection._calls, "pause", lambda *_: True)
        with pytest.raises(BrokerError) as caught:
            connection.ensure([QueueSpec(name="q", fifo=False, visibility=30)], create=True)
    assert "127.0.0.1:1" in str(caught.value)
    assert "hunter2" not in str(caught.value) + caplog.text + broker.describe()
