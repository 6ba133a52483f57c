import boto3
import pytest

from sqspipes_mp import SQS, Engine, Task
from tests.credential_server import serving_apart


def numbers():
    yield from range(16)


def double(value):
    return 2 * value


@pytest.mark.parametrize("session", [None, boto3.Session], ids=["chain", "session"])
def test_a_fleet_makes_one_request_for_credentials(monkeypatch, moto_url, tmp_path, session, request):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    log = tmp_path / "requests"
    with serving_apart(log, lives=3600) as url:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", url)
        broker = SQS("us-east-1", endpoint_url=moto_url, session=session)
        engine = Engine([numbers, Task(double, workers=12)], domain=f"fleet-{request.node.callspec.id}", broker=broker)
        with engine.run(iterate=True) as results:
            assert sorted(next(results) for _ in range(16)) == [2 * n for n in range(16)]
    # The keeper's first connection, which checks the queues, and its second, which fills the wallet.
    assert len(log.read_text().split()) <= 2
