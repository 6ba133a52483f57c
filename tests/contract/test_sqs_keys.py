"""Credentials that cannot be had or are refused: whose answer it was, what cures it, and others that are found."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import boto3
import pytest
from botocore.exceptions import ConnectTimeoutError

from sqspipes_mp import SQS
from sqspipes_mp.brokers.base import QueueSpec
from sqspipes_mp.brokers.sqs.faults import CallFailed, no_keys
from sqspipes_mp.brokers.sqs.http import Keys
from sqspipes_mp.errors import AccessDenied, ConfigError
from standin import StandIn, standin

_DENIED = b"""<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type>
<Code>AccessDenied</Code><Message>not authorized to perform: sts:AssumeRole</Message></Error></ErrorResponse>"""


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment without credentials; the folder of the AWS files, which are empty."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, variable in (("config", "AWS_CONFIG_FILE"), ("credentials", "AWS_SHARED_CREDENTIALS_FILE")):
        (tmp_path / name).touch()
        monkeypatch.setenv(variable, str(tmp_path / name))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr("sqspipes_mp.brokers.sqs.faults.UNKNOWN_PATIENCE", 0.0)
    return tmp_path


@contextlib.contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """A server with one answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST  # noqa: N815  (the server's name)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def refused(broker: SQS) -> str:
    """Return the text of the error that a first call ends with."""
    with pytest.raises(AccessDenied) as caught, contextlib.closing(broker.open()) as connection:
        connection.ensure([QueueSpec(name="q", fifo=False, visibility=30)], create=False)
    assert "sqs:" not in str(caught.value)
    return str(caught.value)


def nowhere(**settings: Any) -> SQS:
    return SQS("us-east-1", endpoint_url="http://127.0.0.1:1", **settings)


def test_the_answer_of_sts_is_told_as_that_of_sts(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "config").write_text(
        "[profile fleet]\nrole_arn = arn:aws:iam::1:role/x\nsource_profile = base\n"
        "[profile base]\naws_access_key_id = A\naws_secret_access_key = B\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "fleet")
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    with answering(403, _DENIED) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", url)
        assert "a region of its own" in refused(nowhere())
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        text = refused(nowhere())
        assert "AssumeRole: AccessDenied" in text
        assert "not SQS's answer" in text
        assert "trust policy" in text

        def assumes() -> boto3.Session:
            sts = boto3.client("sts", "us-east-1", aws_access_key_id="A", aws_secret_access_key="B")
            sts.assume_role(RoleArn="arn:aws:iam::1:role/some-role", RoleSessionName="me")
            return boto3.Session()

        assert "AssumeRole: AccessDenied" in refused(nowhere(session=assumes))


def test_a_token_file_that_is_missing_is_named(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/x")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(bare / "token"))
    assert str(bare / "token") in refused(nowhere())


def test_a_code_is_asked_of_nobody(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "config").write_text(
        "[profile fleet]\nrole_arn = arn:aws:iam::1:role/x\nsource_profile = base\nmfa_serial = arn:aws:iam::1:mfa/me\n"
        "[profile base]\naws_access_key_id = A\naws_secret_access_key = B\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "fleet")
    assert "needs no code" in refused(nowhere())
    assert "needs no code" in refused(nowhere(session=boto3.Session))


@pytest.mark.parametrize("program", ["import sys; sys.exit('no ticket')", "print('{}')", "print('no JSON')"])
def test_a_credential_process_that_fails_is_no_wrong_setting(
    bare: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    (bare / "process.py").write_text(program)
    (bare / "config").write_text(f"[profile fleet]\ncredential_process = {sys.executable} {bare / 'process.py'}\n")
    monkeypatch.setenv("AWS_PROFILE", "fleet")
    assert "no credentials for SQS" in refused(nowhere())


def test_a_credential_endpoint_that_fails_is_no_wrong_setting(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0)
    with answering(500, b"{}") as url:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{url}/creds")
        assert "can be reached" in refused(nowhere())


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "boto3"])
@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
def test_a_line_break_in_a_key_is_told_without_the_key(
    bare: Path, monkeypatch: pytest.MonkeyPatch, name: str, lean: bool
) -> None:
    for each in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(each, f"HIDDEN-{each}" + ("\n" if each == name else ""))
    with contextlib.closing(nowhere(lean=lean).open()) as connection, pytest.raises(AccessDenied) as caught:
        # A URL is not asked for: the first call is one of the fast path's.
        connection.receive(["http://127.0.0.1:1/1/q"], 10, 0, 30)
    assert "has a line break" in str(caught.value)
    assert "HIDDEN" not in str(caught.value)


@pytest.mark.parametrize("key", ["AKIA\n", "AK IA", "AKIÄ"])
def test_a_key_of_the_codes_that_cannot_be_sent_is_a_wrong_setting(key: str) -> None:
    for pair in ((key, "secret"), ("id", key)):
        with pytest.raises(ConfigError) as caught:
            SQS("us-east-1", access_key=pair[0], secret_key=pair[1])
        assert key not in str(caught.value)
        assert repr(key) not in str(caught.value)


@pytest.fixture(scope="module")
def server() -> Iterator[StandIn]:
    with standin() as server:
        yield server


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "boto3"])
@pytest.mark.parametrize("own", [False, True], ids=["file", "session"])
def test_rotated_credentials_are_looked_for_before_a_call_is_given_up(
    bare: Path, server: StandIn, lean: bool, own: bool
) -> None:
    def write(key: str) -> None:
        (bare / "credentials").write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")

    write("OLD")
    server.keys(renew=["OLD"])
    broker = SQS("us-east-1", endpoint_url=server.url, lean=lean, session=boto3.Session if own else None)
    with contextlib.closing(broker.open()) as connection:
        connection.ensure([QueueSpec(name="q", fifo=False, visibility=30)], create=True)
        assert connection.receive(["q"], 10, 0, 30) == []
        server.keys(expire=["OLD"])
        write("NEW")
        assert connection.receive(["q"], 10, 0, 30) == []
        assert (connection._calls._lean is not None) is lean
        assert connection.depth("q").empty


def test_a_service_that_may_be_back_is_waited_for(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqspipes_mp.brokers.sqs.faults.REFUSED_PATIENCE", 0.0)
    broker = SQS("us-east-1", endpoint_url=server.url, access_key="A", secret_key="B", lean=False)
    with contextlib.closing(broker.open()) as connection:
        calls = connection._calls
        plain, pauses = calls.clients, []

        def away() -> Keys:
            raise CallFailed(no_keys(ConnectTimeoutError(endpoint_url="http://sts")))

        def pause(seconds: float, _worthwhile: object = None) -> bool:
            pauses.append(seconds)
            if len(pauses) == 5:
                calls.clients = plain
            return True

        calls.clients = replace(plain, keys=away)
        monkeypatch.setattr(calls, "pause", pause)
        assert "QueueUrl" in calls("CreateQueue", "q", {"QueueName": "q"})
        assert len(pauses) == 5
