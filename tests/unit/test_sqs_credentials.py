import datetime as dt
import json
import threading
from functools import partial

import boto3
import pytest

from sqspipes_mp import SQS
from sqspipes_mp.brokers.sqs import credentials as sqs_shared
from sqspipes_mp.brokers.sqs.credentials import CredentialsPending
from sqspipes_mp.brokers.sqs.faults import Kind, classify_error
from sqspipes_mp.ipc.scoreboard import Scoreboard
from tests.credential_server import serving
from tests.gates import eventually


class Wallet:
    text = None

    def read(self):
        return self.text

    def write(self, text):
        self.text = text


@pytest.fixture(params=[None, boto3.Session], ids=["chain", "session"])
def chain(monkeypatch, request):
    """An environment in which credentials come from a container's endpoint, as in ECS."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    # Its 2 s may pass on a busy machine, and then it asks twice.
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.TIMEOUT_SECONDS", 30)

    def use(url):
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", url)
        return SQS("us-east-1", endpoint_url="http://127.0.0.1:1", session=request.param)

    return use


def _key(connection):
    return connection._calls.clients.hot._request_signer._credentials.get_frozen_credentials().access_key


def _snapshot(key, minutes):
    expires = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=minutes)
    return json.dumps({"access_key": key, "secret_key": "s", "token": "t", "expiry_time": expires.isoformat()})


def test_the_keeper_shares_what_it_fetched_and_workers_fetch_nothing(chain):
    with serving(lives=3600) as (url, given):
        broker, wallet = chain(url), Wallet()
        keeper = broker.open(patience=1.0, wallet=wallet)
        keeper.tend()
        workers = [broker.open(wallet=wallet) for _ in range(5)]
        assert {_key(worker) for worker in workers} == {"AKIA0001"}
        assert given == ["AKIA0001"]
        for connection in (keeper, *workers):
            connection.close()


def test_a_worker_takes_the_rotated_credentials_from_the_wallet(chain):
    with serving(lives=3600) as (url, given):
        broker, wallet = chain(url), Wallet()
        wallet.write(_snapshot("OLD", 4))
        worker = broker.open(wallet=wallet)
        wallet.write(_snapshot("NEW", 60))
        assert _key(worker) == "NEW"
        assert given == []
        worker.close()


def test_a_worker_whose_wallet_is_stale_asks_itself(chain):
    with serving(lives=3600) as (url, given):
        broker, wallet = chain(url), Wallet()
        wallet.write(_snapshot("OLD", 4))
        worker = broker.open(wallet=wallet)
        assert _key(worker) == "AKIA0001"
        assert given == ["AKIA0001"]
        worker.close()


def test_workers_of_one_engine_do_not_look_for_newer_ones_all_at_once(chain):
    with serving(lives=3600) as (url, given):
        broker, wallet = chain(url), Wallet()
        wallet.write(_snapshot("OLD", 60))
        workers = [broker.open(wallet=wallet) for _ in range(12)]
        held = [worker._calls.clients.hot._request_signer._credentials for worker in workers]
        assert len({each._advisory_refresh_timeout for each in held}) > 1
        assert all(each._mandatory_refresh_timeout < each._advisory_refresh_timeout < 600 for each in held)
        assert given == []
        for worker in workers:
            worker.close()


def test_the_keeper_refreshes_before_the_workers_have_to(chain):
    with serving(lives=3600) as (url, _given):
        broker, wallet = chain(url), Wallet()
        wallet.write(_snapshot("OLD", 12))
        keeper = broker.open(patience=60.0, wallet=wallet)
        keeper.tend()
        assert json.loads(wallet.read())["access_key"] == "AKIA0001"
        keeper.close()


@pytest.mark.parametrize("minutes", [12, 4, 0.1], ids=["may", "must", "over"])
def test_a_slow_credentials_service_does_not_hold_up_the_keeper(chain, minutes, caplog):
    answers = threading.Event()

    def before(key):
        assert answers.wait(30)

    with serving(lives=3600, before=before) as (url, given):
        broker, wallet = chain(url), Wallet()
        wallet.write(_snapshot("OLD", minutes))
        keeper = broker.open(patience=0.1, wallet=wallet)
        try:
            # These return though nobody answers.
            keeper.tend()
            keeper.tend()
            if minutes > 1:
                assert _key(keeper) == "OLD"
            else:
                with pytest.raises(CredentialsPending) as caught:
                    _key(keeper)
                assert classify_error(caught.value).kind is Kind.TRANSIENT
                assert "no newer credentials: CredentialsPending" in caplog.text
            assert json.loads(wallet.read())["access_key"] == "OLD"
            assert given == []
        finally:
            answers.set()
        eventually(lambda: keeper.tend() or json.loads(wallet.read())["access_key"] != "OLD")
        assert _key(keeper) == json.loads(wallet.read())["access_key"]
        keeper.close()


def test_a_fetch_that_hangs_for_good_is_asked_for_anew(monkeypatch):
    hung, ends = threading.Event(), threading.Event()
    calls: list[None] = []

    def refresh():
        calls.append(None)
        if len(calls) == 1:
            hung.set()
            ends.wait(30)
        return "newer"

    beside = sqs_shared._Beside(refresh, 0.01)
    for _ in range(2):
        with pytest.raises(CredentialsPending):
            beside()
    assert hung.wait(30)
    monkeypatch.setattr(sqs_shared, "_HANGS", -1.0)
    eventually(lambda: answer(beside) == "newer")
    ends.set()


def answer(beside):
    try:
        return beside()
    except CredentialsPending:
        return None


def test_a_role_of_a_profile_is_not_assumed_by_workers_whose_keeper_has_done_so(monkeypatch, tmp_path):
    config = tmp_path / "config"
    config.write_text(
        "[profile fleet]\nregion = eu-west-1\nrole_arn = arn:aws:iam::1:role/x\ncredential_source = Environment\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    # Whoever assumes it himself finds nobody here.
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:1")
    broker, wallet = (
        SQS(endpoint_url="http://127.0.0.1:1", session=partial(boto3.Session, profile_name="fleet")),
        Wallet(),
    )
    wallet.write(_snapshot("OURS", 60))
    worker = broker.open(wallet=wallet)
    assert _key(worker) == "OURS"
    assert worker._calls.clients.region == "eu-west-1"
    worker.close()


def test_static_credentials_are_not_shared():
    wallet = Wallet()
    connection = SQS("us-east-1").open(patience=1.0, wallet=wallet)
    connection.tend()
    assert wallet.read() is None
    assert _key(connection) == "testing"
    connection.close()


def test_the_boards_wallet_keeps_a_text_and_refuses_one_that_is_too_long():
    board = Scoreboard.create(1, 1)
    assert board.wallet.read() is None
    board.wallet.write("é" * 1000)
    assert board.wallet.read() == "é" * 1000
    board.wallet.write("x" * 100_000)
    assert board.wallet.read() == "é" * 1000
    board.close()
