"""The lean path signs as botocore does, survives what kept connections do, and leaves everything unusual to boto3."""

import contextlib
import functools
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.auth
import botocore.awsrequest
import botocore.client
import botocore.config
import botocore.credentials
import botocore.httpsession
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqspipes_mp import SQS
from sqspipes_mp.brokers.base import Completion, Handle
from sqspipes_mp.brokers.sqs.faults import Fault, Kind, classify_error
from sqspipes_mp.brokers.sqs.http import OPERATIONS, BadReply, Lean, Signer, Target, TimedOut, Unsure
from sqspipes_mp.brokers.sqs.http_connect import Connector, Unreachable
from sqspipes_mp.errors import ConfigError
from sqspipes_mp.ipc.request_meter import RequestMeter
from sqspipes_mp.ipc.scoreboard import Scoreboard
from sqspipes_mp.ipc.statistics import TRANSPORT, TRANSPORTS
from tests.wire.certificates import Authority

KEYS = botocore.credentials.ReadOnlyCredentials("AKIA", "secret", None)
TEXT = st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S")), min_size=1)
MADE: dict[str, Any] = {
    "region": "us-east-1",
    "endpoint_url": "http://127.0.0.1:1",
    "access_key": "a",
    "secret_key": "b",
}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for name in [
        name for name in os.environ if name.startswith("AWS_") or name.lower().endswith(("_proxy", "_bundle"))
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


@settings(max_examples=60, deadline=None)
@given(
    access=TEXT,
    secret=st.text(min_size=1),
    token=st.none() | TEXT,
    region=st.from_regex(r"[a-z]{2}-[a-z]{4,9}-[1-9]", fullmatch=True),
    host=st.sampled_from(
        ["sqs.us-east-1.amazonaws.com", "127.0.0.1:9324", "[::1]:80", "vpce-1.sqs.eu-west-1.vpce.com"]
    ),
    operation=st.sampled_from(sorted(OPERATIONS)),
    body=st.binary(),
    when=st.datetimes(),
)
def test_signature_is_botocores(access, secret, token, region, host, operation, body, when) -> None:
    keys = botocore.credentials.ReadOnlyCredentials(access, secret, token)
    signer = Signer(region)
    # The second time its key is a kept one.
    heads = {signer.headers(keys, host, operation, body, when.timetuple()) for _ in range(2)}
    assert len(heads) == 1
    ours = dict(line.split(": ", 1) for line in heads.pop().splitlines())
    theirs = botocore.awsrequest.AWSRequest(
        method="POST",
        url=f"http://{host}/",
        data=body,
        headers={
            "X-Amz-Target": f"AmazonSQS.{operation}",
            "Content-Type": "application/x-amz-json-1.0",
            "x-amzn-query-mode": "true",
            "Host": host,
        },
    )
    theirs.context["timestamp"] = ours["x-amz-date"]
    auth = botocore.auth.SigV4Auth(keys, "sqs", region)
    auth._modify_request_before_signing(theirs)
    text = auth.string_to_sign(theirs, auth.canonical_request(theirs))
    auth._inject_signature_to_request(theirs, auth.signature(text, theirs))
    assert ours == {name.lower(): value for name, value in theirs.headers.items()}


@contextlib.contextmanager
def spoken(*scripts: Callable[[socket.socket], object]) -> Iterator[tuple[int, list[int]]]:
    """Serve connections in turn, each by its script; yield the port and the list of connections that came."""
    came: list[int] = []

    def serve() -> None:
        for number, script in enumerate(scripts):
            peer, _ = server.accept()
            came.append(number)
            with peer:
                script(peer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1], came
        thread.join(20)
        assert not thread.is_alive()


def asked(peer: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += peer.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
    while len(body) < length:
        body += peer.recv(65536)
    return body


def reply(body: bytes = b"{}", first: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {first}\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


def answering(*replies: bytes) -> Callable[[socket.socket], None]:
    """Answer so many requests, then close."""

    def script(peer: socket.socket) -> None:
        for each in replies:
            asked(peer)
            peer.sendall(each)

    return script


def dying(peer: socket.socket) -> None:
    asked(peer)


def path(port: int, tries: int = 2) -> Lean:
    target = Target(Connector("127.0.0.1", port), "us-east-1", lambda: KEYS)
    return Lean(target, connect_timeout=30, tries=tries)


def test_connection_is_kept_and_one_that_was_closed_while_idle_is_no_failure() -> None:
    closed = threading.Event()

    def twice(peer: socket.socket) -> None:
        answering(reply(b'{"n":1}'), reply(b'{"n":2}'))(peer)
        peer.close()
        closed.set()

    with spoken(twice, answering(reply(b'{"n":3}'))) as (port, came):
        lean = path(port, tries=1)
        assert [lean("SendMessageBatch", {}, 30)["n"] for _ in range(2)] == [1, 2]
        assert closed.wait(30)
        time.sleep(0.01)
        assert lean("SendMessageBatch", {}, 30) == {"n": 3}
        lean.close()
    assert came == [0, 1]


def dies_at_second(peer: socket.socket) -> None:
    answering(reply())(peer)
    asked(peer)


def test_kept_connection_that_dies_under_a_request_costs_a_send_its_only_try_and_others_none() -> None:
    with spoken(dies_at_second, answering(reply())) as (port, came):
        lean = path(port, tries=1)
        lean("DeleteMessageBatch", {}, 30)
        assert lean("DeleteMessageBatch", {}, 30) == {}
        lean.close()
    assert came == [0, 1]
    with spoken(dies_at_second) as (port, _):
        lean = path(port, tries=1)
        lean("SendMessageBatch", {}, 30)
        with pytest.raises(Unreachable):
            lean("SendMessageBatch", {}, 30)
        lean.close()


def test_new_connection_that_dies_is_tried_once_more_and_judged_as_botocores() -> None:
    with spoken(dying, dying) as (port, came):
        lean = path(port)
        with pytest.raises(Unreachable) as caught:
            lean("ReceiveMessage", {}, 30)
        lean.close()
    assert came == [0, 1]
    fault = classify_error(caught.value)
    assert isinstance(fault, Fault)
    assert fault.kind is Kind.UNREACHABLE


def test_silence_is_a_timeout() -> None:
    done = threading.Event()
    with spoken(lambda peer: asked(peer) and done.wait(30)) as (port, _):
        lean = path(port, tries=1)
        with pytest.raises(TimedOut, match=r"0\.05 s"):
            lean("ReceiveMessage", {}, 0.05)
        done.set()
        lean.close()


def test_nobody_there_is_unreachable() -> None:
    with socket.socket() as unused:
        # Bound, so that nobody else gets it; not listening.
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(Unreachable):
            path(unused.getsockname()[1], tries=1)("ReceiveMessage", {}, 30)


@pytest.mark.parametrize(
    ("first", "body", "more", "kind"),
    [
        ("400 Bad", b'{"__type":"com.amazonaws.sqs#QueueDoesNotExist","message":"no"}', "", Kind.MISSING),
        (
            "400 Bad",
            b'{"__type":"x#Y"}',
            "x-amzn-query-error: AWS.SimpleQueueService.NonExistentQueue;Sender\r\n",
            "MISSING",
        ),
        ("403 No", b'{"__type":"ExpiredTokenException","Message":"old"}', "", Kind.CREDENTIALS),
        ("403 No", b'{"__type":"AccessDeniedException"}', "", Kind.DENIED),
        ("503 Busy", b"<html>busy</html>", "", Kind.TRANSIENT),
        ("400 Slow", b'{"__type":"ThrottlingException"}', "", Kind.TRANSIENT),
    ],
)
def test_errors_are_judged_as_boto3s(first: str, body: bytes, more: str, kind: Kind | str) -> None:
    with spoken(answering(reply(body, first, more))) as (port, _):
        lean = path(port, tries=1)
        with pytest.raises(BadReply) as caught:
            lean("SendMessageBatch", {}, 30)
        lean.close()
    fault = classify_error(caught.value)
    assert fault is not None
    assert fault.kind is (Kind[kind] if isinstance(kind, str) else kind)


STRANGE = {
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "no length": b"HTTP/1.1 200 OK\r\n\r\n{}",
    "compressed": reply(more="Content-Encoding: gzip\r\n"),
    "no json": reply(b"<html>"),
    "no object": reply(b"[]"),
    "moved": reply(first="307 Elsewhere", more="Location: http://example.com/\r\n"),
    "no http": b"220 smtp ready\r\n\r\n",
    "too much": reply() + b"more",
    "bad field": b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n",
    "bad length": b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n{}",
    "skewed": reply(b'{"__type":"InvalidSignatureException","message":"Signature expired"}', "403 No"),
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
}


@pytest.mark.parametrize("strange", STRANGE)
def test_strange_reply_is_left_to_boto3(strange: str) -> None:
    with spoken(answering(STRANGE[strange])) as (port, _):
        lean = path(port)
        with pytest.raises(Unsure):
            lean("DeleteMessageBatch", {}, 30)
        lean.close()


def test_first_strange_reply_ends_the_lean_path_and_the_call_succeeds(caplog: pytest.LogCaptureFixture) -> None:
    answers = [
        answering(reply(b'{"QueueUrl":"http://127.0.0.1/1/q"}'), *[reply(b'{"Successful":[{"Id":"0"}]}')] * 2),
        answering(STRANGE["chunked"]),
    ]

    def serve(peer: socket.socket) -> None:
        # boto3's connection stays open meanwhile.
        threads = [threading.Thread(target=answers[0], args=(peer,))]
        threads[0].start()
        other, _ = server.accept()
        with other:
            answers[1](other)
        threads[0].join(20)

    def accept() -> None:
        peer, _ = server.accept()
        with peer:
            serve(peer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=accept)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        connection = SQS("us-east-1", endpoint_url=url, access_key="a", secret_key="b").open()
        board = Scoreboard.create(1, 1)
        connection.count_requests(RequestMeter(board, 0))
        transports = [board.get(0, TRANSPORT)]
        with caplog.at_level(logging.INFO, "sqspipes_mp"):
            for number in range(2):
                assert connection.complete([Completion(Handle("q", "r", f"{number}"))]) == []
                transports.append(board.get(0, TRANSPORT))
        connection.close()
        board.close()
        thread.join(20)
    assert [TRANSPORTS[number - 1] for number in transports] == ["fast", "boto3", "boto3"]
    assert [record.getMessage() for record in caplog.records if "boto3 makes all calls" in record.getMessage()] == [
        f"boto3 makes all calls to {url} from here on: a reply without a plain body of known length"
    ]


def test_forked_process_takes_no_connection_of_its_parent() -> None:
    with spoken(answering(reply(), reply()), answering(reply())) as (port, came):
        lean = path(port)
        lean("DeleteMessageBatch", {}, 30)
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                lean._take_idle()
                os._exit(0 if not lean._idle else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        # The copies closed there, the parent's own is as it was.
        assert lean("DeleteMessageBatch", {}, 30) == {}
        assert came == [0]
        lean.close()
        with socket.create_connection(("127.0.0.1", port)) as last:
            last.sendall(b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
            last.recv(100)


def is_lean(broker: SQS) -> bool:
    connection = broker.open()
    connection.close()
    return connection._calls._lean is not None


def test_chosen_by_itself_and_switched_off_by_one_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_lean(SQS(**MADE))
    assert is_lean(SQS("us-west-2", access_key="a", secret_key="b"))
    assert not is_lean(SQS(**MADE, lean=False))
    with pytest.raises(ConfigError, match="lean"):
        SQS(lean="no")  # type: ignore[arg-type]
    monkeypatch.setenv("SQSPIPES_MP_LEAN", "0")
    assert not is_lean(SQS(**MADE))


@pytest.mark.parametrize(
    ("name", "value", "endpoint"),
    [
        ("BOTO_EXPERIMENTAL__ADD_PROXY_HOST_HEADER", "true", None),
        ("AWS_AUTH_SCHEME_PREFERENCE", "sigv4a", None),
        ("UNRELATED", "1", "http://127.0.0.1:1/some/path"),
    ],
)
def test_unusual_settings_are_boto3s(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, endpoint: str | None
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:2")
    monkeypatch.setenv(name, value)
    assert not is_lean(SQS("us-west-2", endpoint_url=endpoint, access_key="a", secret_key="b"))


def test_reason_for_boto3_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("sqspipes_mp.brokers.sqs.http_fit._logged", set())
    broker = SQS("us-west-2", endpoint_url="http://127.0.0.1:1/some/path", access_key="a", secret_key="b")
    with caplog.at_level(logging.INFO, "sqspipes_mp"):
        assert not is_lean(broker)
        assert not is_lean(broker)
    assert [record.getMessage() for record in caplog.records if "boto3" in record.getMessage()] == [
        f"boto3 makes all calls to {broker.endpoint_url}: the endpoint {broker.endpoint_url} has more than a host"
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTPS_PROXY", "http://127.0.0.1:2"),
        ("https_proxy", "https://user:word@127.0.0.1:2"),
        ("HTTP_PROXY", "http://127.0.0.1:2"),
        # botocore has no proxy for all schemes.
        ("ALL_PROXY", "http://127.0.0.1:2"),
        ("AWS_CA_BUNDLE", botocore.httpsession.get_cert_path(verify=True)),
        ("REQUESTS_CA_BUNDLE", botocore.httpsession.get_cert_path(verify=True)),
        ("AWS_USE_FIPS_ENDPOINT", "true"),
        ("AWS_USE_DUALSTACK_ENDPOINT", "true"),
        ("AWS_ENDPOINT_URL_SQS", "http://127.0.0.1:1"),
    ],
)
def test_settings_of_the_environment_are_served(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert is_lean(SQS("us-west-2", access_key="a", secret_key="b"))


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
@pytest.mark.parametrize("text", [None, "no certificate"])
def test_bundle_that_cannot_be_read_is_a_config_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, text: str | None
) -> None:
    bundle = tmp_path / "bundle.pem"
    if text is not None:
        bundle.write_text(text)
    monkeypatch.setenv(name, str(bundle))
    with pytest.raises(ConfigError, match=r"CA bundle.*bundle\.pem"):
        SQS("us-west-2", access_key="a", secret_key="b").open()


def test_client_certificate_that_cannot_be_used_is_a_config_error(tmp_path: Path) -> None:
    # Its key is encrypted: OpenSSL must not ask for the password on the terminal.
    certificate = Authority(tmp_path, "ours").issue("client", password=b"word")
    with pytest.raises(ConfigError, match=r"client certificate.*client\.crt"):
        SQS(session=lambda: session(client_cert=certificate)).open()


def session(**config: Any) -> boto3.Session:
    made = boto3.Session("a", "b", region_name="us-east-1")
    if config:
        made._session.set_default_client_config(botocore.config.Config(**config))
    return made


def hooked() -> boto3.Session:
    made = session()
    made.events.register("before-send.sqs", lambda **_: None)
    return made


class Own(boto3.Session):
    def client(self, *args, **kwargs):
        return super().client(*args, verify=False, **kwargs)


def with_own_http() -> boto3.Session:
    class Http:
        def client(self, *args, **kwargs):
            client = made.client(*args, **kwargs)
            client._endpoint.http_session = self
            return client

        region_name, _session, get_credentials = "us-east-1", session()._session, session().get_credentials

        def close(self) -> None:
            pass

    made = session()
    return Http()


@pytest.mark.parametrize(
    ("make", "lean"),
    [
        (session, True),
        (lambda: session(proxies={"https": "http://127.0.0.1:2"}), True),
        (
            lambda: session(
                proxies={"https": "https://127.0.0.1:2"}, proxies_config={"proxy_use_forwarding_for_https": True}
            ),
            False,
        ),
        (lambda: session(signature_version="v4a"), False),
        (hooked, False),
        (lambda: Own("a", "b", region_name="us-east-1"), True),
        (with_own_http, False),
    ],
)
def test_session_of_the_users_is_served_where_it_is_ordinary(make: Callable[[], boto3.Session], lean: bool) -> None:
    assert is_lean(SQS(session=make)) is lean


def test_client_that_is_wrapped_for_tracing_keeps_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    original = botocore.client.BaseClient._make_api_call

    @functools.wraps(original)
    def traced(self, *args):
        return original(self, *args)

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", traced)
    assert not is_lean(SQS(**MADE))


ENDPOINTS: list[tuple[str, dict[str, str], str]] = [
    ("us-east-1", {}, "https://sqs.us-east-1.amazonaws.com/"),
    ("eu-central-1", {}, "https://sqs.eu-central-1.amazonaws.com/"),
    ("cn-north-1", {}, "https://sqs.cn-north-1.amazonaws.com.cn/"),
    ("us-gov-west-1", {}, "https://sqs.us-gov-west-1.amazonaws.com/"),
    ("us-east-1", {"AWS_USE_FIPS_ENDPOINT": "true"}, "https://sqs-fips.us-east-1.amazonaws.com/"),
    ("fips-us-east-1", {}, "https://sqs-fips.us-east-1.amazonaws.com/"),
    ("us-west-2", {"AWS_USE_DUALSTACK_ENDPOINT": "true"}, "https://sqs.us-west-2.api.aws/"),
    ("us-west-2", {"AWS_ENDPOINT_URL_SQS": "https://vpce-1.sqs.example.com"}, "https://vpce-1.sqs.example.com/"),
    ("us-west-2", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9324"}, "http://127.0.0.1:9324/"),
    ("us-west-2", {"AWS_PROFILE": "local"}, "http://127.0.0.1:9325/"),
]


@pytest.mark.parametrize(("region", "environment", "url"), ENDPOINTS)
def test_endpoint_and_scope_are_those_of_botocore(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, region: str, environment: dict[str, str], url: str
) -> None:
    (tmp_path / "config").write_text(
        "[profile local]\nservices = mine\n[services mine]\nsqs =\n  endpoint_url = http://127.0.0.1:9325\n"
    )
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked: list[tuple[str, str]] = []
    client = boto3.Session("a", "b", region_name=region).client("sqs")

    def stop(request, **_):
        asked.append((request.url, request.headers["Authorization"].decode()))
        return botocore.awsrequest.AWSResponse(request.url, 200, {}, None)

    client.meta.events.register("before-send.sqs", stop)
    with contextlib.suppress(Exception):
        client.receive_message(QueueUrl="https://sqs.us-east-1.amazonaws.com/1/q")
    client.close()
    connection = SQS(region, access_key="a", secret_key="b").open()
    connection.close()
    lean = connection._calls._lean
    assert lean is not None
    target = lean._target
    assert asked[0][0] == url == f"http{'s' if target.connect.context else ''}://{target.connect.authority}/"
    head = Signer(target.region).headers(KEYS, target.connect.authority, "ReceiveMessage", b"", time.gmtime())
    scopes = [re.findall(r"Credential=./\d+/(.+?),|Credential=AKIA/\d+/(.+?),", text) for text in (asked[0][1], head)]
    assert scopes[0][0][0] == scopes[1][0][1] == f"{target.region}/sqs/aws4_request"


def test_refreshed_credentials_are_asked_for_each_time() -> None:
    given = iter([KEYS, botocore.credentials.ReadOnlyCredentials("AKIB", "other", "token")])
    heads: list[bytes] = []

    def script(peer: socket.socket) -> None:
        for _ in range(2):
            heads.append(peer.recv(65536))
            peer.sendall(reply())

    with spoken(script) as (port, _):
        target = Target(Connector("127.0.0.1", port), "us-east-1", lambda: next(given))
        lean = Lean(target, connect_timeout=30, tries=1)
        for _ in range(2):
            lean("DeleteMessageBatch", {}, 30)
        lean.close()
    assert b"Credential=AKIA/" in heads[0]
    assert b"Credential=AKIB/" in heads[1]
    assert b"x-amz-security-token: token\r\n" in heads[1]
    assert json.loads(heads[1].partition(b"\r\n\r\n")[2]) == {}
