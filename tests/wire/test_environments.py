"""The lean path serves TLS, proxies and client certificates as boto3 does, and says clearly what is wrong with them."""

import contextlib
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import botocore.config
import pytest

from sqspipes_mp import SQS, Engine, Task
from sqspipes_mp.brokers.base import Completion, Output, QueueSpec
from sqspipes_mp.brokers.sqs.connection import SqsConnection
from sqspipes_mp.brokers.sqs.http import Lean
from sqspipes_mp.errors import BrokerError
from standin import StandIn, standin
from standin.asking import until_waiting
from tests.wire.certificates import Authority
from tests.wire.proxy import proxy

SPEC = QueueSpec(name="q", fifo=False, visibility=30)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("ours"), "ours")
    made.issue("server")
    made.issue("elsewhere", host="127.0.0.2")
    made.issue("client")
    return made


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("theirs"), "theirs")


@pytest.fixture(scope="session", autouse=True)
def secured(authority: Authority) -> Iterator[StandIn]:
    """A stand-in that speaks TLS; for the whole session, so that no test finds it left behind."""
    SQS().warm()
    with standin(certificate=str(authority.both("server"))) as server:
        yield server


@pytest.fixture(scope="session", autouse=True)
def plain() -> Iterator[StandIn]:
    with standin() as server:
        yield server


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [
        name for name in os.environ if name.startswith("AWS_") or name.lower().endswith(("_proxy", "_bundle"))
    ]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_SESSION_TOKEN": "of a session",
    }.items():
        monkeypatch.setenv(name, value.replace(" ", "-"))


class Verifying(boto3.Session):  # type: ignore[misc]
    """A session of a user who says ``verify=`` in code."""

    verify: str | bool = True

    def client(self, *args: Any, **kwargs: Any) -> Any:
        return super().client(*args, verify=self.verify, **kwargs)


def session(verify: str | bool | None = None, **config: Any) -> Callable[[], boto3.Session]:
    def make() -> boto3.Session:
        made = Verifying("testing", "testing") if verify is not None else boto3.Session("testing", "testing")
        if isinstance(made, Verifying) and verify is not None:
            made.verify = verify
        if config:
            made._session.set_default_client_config(botocore.config.Config(**config))
        return made

    return make


@contextlib.contextmanager
def opened(url: str, **settings: Any) -> Iterator[SqsConnection]:
    connection = SQS("us-east-1", endpoint_url=url, **settings).open()
    try:
        yield connection
    finally:
        connection.close()


def lean(connection: SqsConnection) -> Lean:
    """Return the connection's lean path: boto3 has not taken over."""
    found = connection._calls._lean
    assert found is not None, "fell back to boto3"
    return found


def go_round(connection: SqsConnection, *, ensure: bool = True) -> None:
    """Send, receive and delete a message by the lean path, all on one kept connection."""
    if ensure:
        connection.ensure([SPEC], create=True)
    for number in range(3):
        body = f"{number}" * 30_000
        connection.complete([Completion(None, (Output("q", body, os.urandom(8).hex()),))])
        (found,) = connection.receive(["q"], 1, 5, 30)
        assert found.body == body
        assert connection.complete([Completion(found.handle)]) == []
    assert len(lean(connection)._idle) == 1


MEANS = ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "ca_bundle", "verify", "unverified"]


@pytest.mark.parametrize("means", MEANS)
def test_bundle_is_trusted_however_it_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, authority: Authority, secured: StandIn, means: str
) -> None:
    settings: dict[str, Any] = {}
    match means:
        case "ca_bundle":
            (tmp_path / "config").write_text(f"[default]\nca_bundle = {authority.bundle}\n")
        case "verify":
            settings["session"] = session(authority.bundle)
        case "unverified":
            settings["session"] = session(verify=False)
        case _:
            monkeypatch.setenv(means, authority.bundle)
    # boto3 warns of each of its own requests that it has not verified the server.
    expected = pytest.warns(Warning, match="Unverified") if means == "unverified" else contextlib.nullcontext()
    with expected, opened(secured.url, **settings) as connection:
        go_round(connection)


@pytest.mark.parametrize("path", ["lean", "boto3"])
@pytest.mark.parametrize("first", ["ensure", "receive", "send"])
def test_server_that_is_not_trusted_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, stranger: Authority, secured: StandIn, path: str, first: str
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", stranger.bundle)
    with (
        opened(secured.url, lean=path == "lean") as connection,
        pytest.raises(BrokerError, match=r"CertificateError.*certificate verify failed.*check .*certificates"),
    ):
        # A queue's URL is known: the first request is a hot one.
        connection._queues._urls["q"] = f"{secured.url}/123456789012/q"
        match first:
            case "ensure":
                connection._queues._urls.clear()
                connection.ensure([SPEC], create=True)
            case "receive":
                connection.receive(["q"], 1, 5, 30)
            case "send":
                connection.complete([Completion(None, (Output("q", "a", "a"),))])


def test_name_of_the_server_is_checked(monkeypatch: pytest.MonkeyPatch, authority: Authority) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", authority.bundle)
    with (
        standin(certificate=str(authority.both("elsewhere"))) as server,
        opened(server.url) as connection,
        pytest.raises(BrokerError, match=r"CertificateError.*127\.0\.0\.1"),
    ):
        connection._queues._urls["q"] = f"{server.url}/123456789012/q"
        connection.receive(["q"], 1, 5, 30)


def test_certificate_that_was_good_before_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, authority: Authority, stranger: Authority, secured: StandIn
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", authority.bundle)
    with opened(secured.url) as connection:
        go_round(connection)
        trusted = lean(connection)
        other = SQS("us-east-1", endpoint_url=secured.url)
        monkeypatch.setenv("AWS_CA_BUNDLE", stranger.bundle)
        with contextlib.closing(other.open()) as distrusting:
            connection._calls._lean = lean(distrusting)
            with ThreadPoolExecutor(1) as pool:
                asked = pool.submit(connection.receive, ["q"], 1, 0, 30)
                with pytest.raises(TimeoutError):
                    asked.result(2)
                # As if the certificate had been replaced.
                connection._calls._lean = trusted
                assert asked.result(30) == []


def test_client_certificate_is_shown(monkeypatch: pytest.MonkeyPatch, authority: Authority) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", authority.bundle)
    folder = Path(authority.bundle).parent
    pair = (str(folder / "client.crt"), str(folder / "client.key"))
    with standin(certificate=str(authority.both("server")), client_bundle=authority.bundle) as server:
        for shown in (pair, str(authority.both("client"))):
            with opened(server.url, session=session(client_cert=shown)) as connection:
                go_round(connection)


def test_client_certificate_that_is_missing_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, authority: Authority
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", authority.bundle)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority.bundle)
    context.load_cert_chain(authority.both("server"))
    context.verify_mode = ssl.CERT_REQUIRED

    def refuse() -> None:
        # asyncio's servers do not say why they refuse a client.
        while True:
            try:
                peer, _ = listening.accept()
            except OSError:
                return
            with context.wrap_socket(peer, server_side=True, do_handshake_on_connect=False) as inner:
                with contextlib.suppress(OSError):
                    inner.do_handshake()
                with socket.socket(fileno=inner.detach()) as raw, contextlib.suppress(OSError):
                    raw.shutdown(socket.SHUT_WR)
                    while raw.recv(65536):
                        pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        refusing = threading.Thread(target=refuse)
        refusing.start()
        url = f"https://127.0.0.1:{listening.getsockname()[1]}"
        with opened(url) as connection, pytest.raises(BrokerError, match=r"CertificateError.*certificate required"):
            connection._queues._urls["q"] = f"{url}/123456789012/q"
            connection.receive(["q"], 1, 5, 30)
        listening.shutdown(socket.SHUT_RDWR)
        refusing.join(20)


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "config"])
@pytest.mark.parametrize("credentials", [None, "user:pass@word"])
def test_tunnel_through_a_proxy(
    monkeypatch: pytest.MonkeyPatch, authority: Authority, secured: StandIn, name: str, credentials: str | None
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", authority.bundle)
    with proxy(credentials=credentials) as between:
        user = f"{credentials.replace('@', '%40')}@" if credentials else ""
        url = f"http://{user}127.0.0.1:{between.port}"
        settings: dict[str, Any] = {}
        if name == "config":
            settings["session"] = session(proxies={"https": url})
        else:
            monkeypatch.setenv(name, url)
        with opened(secured.url, **settings) as connection:
            go_round(connection)
        # One by boto3 for the queue's URL, and one for all hot calls.
        assert between.asked == [f"CONNECT {secured.url.removeprefix('https://')}"] * 2


def test_proxy_that_speaks_tls_itself(monkeypatch: pytest.MonkeyPatch, authority: Authority, secured: StandIn) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", authority.bundle)
    with proxy(certificate=str(authority.both("server"))) as between:
        monkeypatch.setenv("HTTPS_PROXY", f"https://127.0.0.1:{between.port}")
        with opened(secured.url) as connection:
            go_round(connection)
        assert len(between.asked) == 2


def test_proxy_is_trusted_only_by_its_own_bundle(
    monkeypatch: pytest.MonkeyPatch, authority: Authority, stranger: Authority, secured: StandIn
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", authority.bundle)
    with proxy(certificate=str(authority.both("server"))) as between:
        proxies = {"https": f"https://127.0.0.1:{between.port}"}
        for bundle, error in ((authority.bundle, None), (stranger.bundle, "CertificateError.*proxy")):
            given = session(proxies=proxies, proxies_config={"proxy_ca_bundle": bundle})
            expected = pytest.raises(BrokerError, match=error) if error else contextlib.nullcontext()
            with opened(secured.url, session=given) as connection, expected:
                connection._queues._urls["q"] = f"{secured.url}/123456789012/q"
                go_round(connection, ensure=error is None)


def test_no_proxy_names_hosts_without_one(
    monkeypatch: pytest.MonkeyPatch, authority: Authority, secured: StandIn
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", authority.bundle)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with opened(secured.url) as connection:
        go_round(connection)


def test_proxy_that_refuses_is_an_error_that_shows_no_password(
    monkeypatch: pytest.MonkeyPatch, authority: Authority, secured: StandIn
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", authority.bundle)
    with proxy(credentials="user:right") as between:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:wrong@127.0.0.1:{between.port}")
        with opened(secured.url) as connection:
            fault = connection._calls._once("ReceiveMessage", {"QueueUrl": "q"})
            with pytest.raises(BrokerError, match="ProxyConnectionError") as caught:
                connection.ensure([SPEC], create=True)
    assert f"through the proxy 127.0.0.1:{between.port}: " in str(fault)
    assert "407" in str(fault)
    assert "wrong" not in str(fault) + str(caught.value)


@pytest.mark.parametrize("credentials", [None, "user:word"])
def test_plain_endpoint_behind_a_proxy(
    monkeypatch: pytest.MonkeyPatch, plain: StandIn, credentials: str | None
) -> None:
    with proxy(credentials=credentials) as between:
        monkeypatch.setenv("HTTP_PROXY", f"http://{credentials + '@' if credentials else ''}127.0.0.1:{between.port}")
        with opened(plain.url) as connection:
            go_round(connection)
        assert between.asked == [f"POST {plain.url}/"] * 2


def test_closing_in_a_fork_sends_nothing(
    monkeypatch: pytest.MonkeyPatch, authority: Authority, secured: StandIn
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", authority.bundle)
    with proxy() as inner, proxy(certificate=str(authority.both("server"))) as outer:
        # TLS, and TLS within TLS.
        for url, between in ((f"http://127.0.0.1:{inner.port}", inner), (f"https://127.0.0.1:{outer.port}", outer)):
            monkeypatch.setenv("HTTPS_PROXY", url)
            with opened(secured.url) as connection:
                go_round(connection)
                sent = between.bytes_up
                pid = os.fork()
                if pid == 0:
                    with contextlib.suppress(BaseException):
                        assert lean(connection)._take_idle() is None
                        os._exit(0 if not lean(connection)._idle else 1)
                    os._exit(2)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
                assert between.bytes_up == sent
                go_round(connection)
                # No further connection: the parent's own is as it was.
                assert len(between.asked) == 2


def test_connection_that_was_closed_while_idle_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, authority: Authority, secured: StandIn
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", authority.bundle)
    with proxy() as between:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{between.port}")
        with opened(secured.url) as connection:
            go_round(connection)
            before = len(between.asked)
            lean(connection)._tries = 1
            between.cut()
            kept = lean(connection)._idle[0]
            deadline = time.monotonic() + 20
            while not readable(kept) and time.monotonic() < deadline:
                threading.Event().wait(0.01)
            url = connection.address("q")
            entries = [{"Id": "0", "MessageBody": "a"}]
            assert lean(connection)("SendMessageBatch", {"QueueUrl": url, "Entries": entries}, 20)["Successful"]
            assert len(between.asked) == before + 1
            (found,) = connection.receive(["q"], 1, 5, 30)
            connection.complete([Completion(found.handle)])


def readable(sock: Any) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


def test_48_requests_of_one_connection_overlap(monkeypatch: pytest.MonkeyPatch, authority: Authority) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", authority.bundle)
    with (
        standin(certificate=str(authority.both("server")), latency_ms=200) as server,
        opened(server.url) as connection,
        ThreadPoolExecutor(48) as pool,
    ):
        connection.ensure([SPEC], create=True)
        for tries in range(3):
            start = time.monotonic()
            outputs = [Completion(None, (Output("q", f"{n}", os.urandom(8).hex()),)) for n in range(48)]
            assert list(pool.map(lambda each: connection.complete([each]), outputs)) == [[]] * 48
            # In turn they would take ten seconds.
            assert time.monotonic() - start < 5, tries
        found = [each for many in pool.map(lambda _: connection.receive(["q"], 10, 0, 30), range(30)) for each in many]
        assert sorted(int(each.body) for each in found) == sorted(list(range(48)) * 3)
        assert 2 <= len(lean(connection)._idle) <= 50


def test_interrupt_lets_a_poll_end_by_itself(
    monkeypatch: pytest.MonkeyPatch, authority: Authority, secured: StandIn
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", authority.bundle)
    with opened(secured.url) as connection:
        go_round(connection)
        with ThreadPoolExecutor(1) as pool:
            polling = pool.submit(connection.receive, ["q"], 1, 1, 30)
            connection.interrupt()
            assert polling.result(20) == []
        assert len(lean(connection)._idle) == 1


def test_interrupt_cuts_a_long_poll_off_and_no_message_is_taken_by_it(
    monkeypatch: pytest.MonkeyPatch, authority: Authority, secured: StandIn
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", authority.bundle)
    with opened(secured.url) as connection, ThreadPoolExecutor(1) as pool:
        go_round(connection)
        for _ in range(2):
            polling = pool.submit(connection.receive, ["q"], 1, 20, 30)
            until_waiting(secured, 1)
            start = time.monotonic()
            connection.interrupt()
            assert polling.result(60) == []
            # By itself it would take 20 s.
            assert time.monotonic() - start < 15
            connection.complete([Completion(None, (Output("q", "x", os.urandom(8).hex()),))])
            connection.receive_again()
            (found,) = connection.receive(["q"], 1, 5, 30)
            assert found.receives == 1
            assert connection.complete([Completion(found.handle)]) == []
        assert len(lean(connection)._idle) == 1


def test_a_reply_to_a_poll_that_is_cut_off_is_read(
    monkeypatch: pytest.MonkeyPatch, authority: Authority, secured: StandIn
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", authority.bundle)
    with opened(secured.url) as connection, ThreadPoolExecutor(1) as pool:
        go_round(connection)
        connection.complete([Completion(None, (Output("q", "x", os.urandom(8).hex()),))])
        secured.pause()
        try:
            polling = pool.submit(connection.receive, ["q"], 1, 20, 30)
            while not connection._calls._polls._sockets:
                assert not polling.done()
        finally:
            secured.resume()
        connection.interrupt()
        assert [each.body for each in polling.result(60)] == ["x"]
        connection.receive_again()


def double(value: int) -> int:
    return value * 2


def test_engine_over_tls_through_a_proxy(
    monkeypatch: pytest.MonkeyPatch, authority: Authority, secured: StandIn
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", authority.bundle)
    with proxy() as between:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{between.port}")
        broker = SQS("us-east-1", endpoint_url=secured.url)
        broker._settle, broker._purge_window = 0.1, 0.0
        engine = Engine([Task(double, input=True, workers=2)], domain="tls", broker=broker, start_method="fork")
        with engine.map(range(200)) as results:
            assert sorted(results) == [2 * n for n in range(200)]
        assert {line.partition(" ")[0] for line in between.asked} == {"CONNECT"}
