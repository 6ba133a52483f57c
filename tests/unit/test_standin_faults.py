"""What the stand-in does wrong when told to, and what its ledger says of it."""

import os
import subprocess
import sys
import time
from typing import Any

import botocore.exceptions
import psutil
import pytest
from botocore import UNSIGNED

from standin import StandIn
from standin.asking import batch, bodies, code_of, connect, delete, name_of, new, receive, send, served

# Faults.


def outcomes(client: Any, url: str, times: int = 60) -> list[str]:
    found = []
    for _ in range(times):
        try:
            send(client, url, "x")
        except botocore.exceptions.ClientError as error:
            found.append(error.response["Error"]["Code"])
        except botocore.exceptions.ConnectionClosedError:
            found.append("reset")
        else:
            found.append("")
    return found


def test_throttling_and_server_errors_come_in_their_varieties(sqs: StandIn, client: Any) -> None:
    url = new(client)
    sqs.faults(throttle=0.3, error=0.3, only=["SendMessage"])
    found = outcomes(client, url)
    assert set(found) == {"ThrottlingException", "RequestThrottled", "InternalFailure", "ServiceUnavailable", ""}
    assert sqs.ledger()["queues"][name_of(url)]["sent"] == found.count("")
    assert sum(sqs.ledger()["faults"].values()) == 60 - found.count("")


def test_same_seed_same_faults() -> None:
    seen = []
    for seed in (1, 1, 2):
        with served(seed=seed, throttle=0.2, reset_before=0.2, only=["SendMessage"]) as (_, client):
            seen.append(outcomes(client, new(client)))
    assert seen[0] == seen[1] != seen[2]


def test_reset_before_does_nothing_and_a_lost_reply_means_done(sqs: StandIn, client: Any) -> None:
    url = new(client)
    sqs.plan("SendMessage", "reset_before")
    sqs.plan("SendMessage", "lost_reply")
    assert outcomes(client, url, 3) == ["reset", "reset", ""]
    assert sqs.ledger()["queues"][name_of(url)]["sent"] == 2
    assert sqs.ledger()["faults"] == {"reset_before": 1, "lost_reply": 1}


def test_lost_reply_of_a_receive_leaves_its_messages_in_flight(sqs: StandIn, client: Any) -> None:
    url, fifo = new(client), new(client, fifo=True)
    for each in (url, fifo):
        send(client, each, "x")
        sqs.plan("ReceiveMessage", "lost_reply")
        with pytest.raises(botocore.exceptions.ConnectionClosedError):
            receive(client, each, ReceiveRequestAttemptId="try" if each == fifo else None)
    assert bodies(client, url) == []
    assert bodies(client, fifo, ReceiveRequestAttemptId="try") == ["x"]


def test_planned_entries_of_a_batch_fail_undone(sqs: StandIn, client: Any) -> None:
    url = new(client)
    sqs.plan("SendMessageBatch", "partial", entries=[0, 2])
    reply = client.send_message_batch(QueueUrl=url, Entries=batch(*"abc"))
    assert [(f["Id"], f["Code"], f["SenderFault"]) for f in reply["Failed"]] == [
        ("0", "InternalError", False),
        ("2", "InternalError", False),
    ]
    messages = receive(client, url)
    assert [message["Body"] for message in messages] == ["b"]
    sqs.plan("DeleteMessageBatch", "partial")
    entries = [{"Id": "1", "ReceiptHandle": messages[0]["ReceiptHandle"]}]
    assert len(client.delete_message_batch(QueueUrl=url, Entries=entries)["Failed"]) == 1
    assert client.delete_message_batch(QueueUrl=url, Entries=entries)["Failed"] == []


def test_some_entries_fail_by_chance(sqs: StandIn, client: Any) -> None:
    url = new(client)
    sqs.faults(partial=0.3)
    replies = [client.send_message_batch(QueueUrl=url, Entries=batch(*"abcdefghij")) for _ in range(10)]
    failed = sum(len(reply["Failed"]) for reply in replies)
    assert 5 < failed < 60
    assert sqs.ledger()["queues"][name_of(url)]["sent"] == 100 - failed


def test_duplicates_are_delivered_twice_or_after_their_delete(sqs: StandIn, client: Any) -> None:
    url, fifo = new(client), new(client, fifo=True)
    send(client, url, *map(str, range(10)))
    send(client, fifo, "once")
    sqs.faults(duplicate=1)
    first = receive(client, url)
    assert len(first) == 10
    sqs.faults(duplicate=0)
    at_once = bodies(client, url)
    for message in first:
        delete(client, url, message)
    after = bodies(client, url)
    assert sorted([*at_once, *after], key=int) == [str(number) for number in range(10)]
    assert at_once
    assert after
    assert sqs.ledger()["queues"][name_of(url)]["duplicates_delivered"] == 10
    (message,) = receive(client, fifo)
    delete(client, fifo, message)
    assert receive(client, fifo) == []


def test_short_poll_may_miss_and_a_slow_reply_is_whole(sqs: StandIn, client: Any) -> None:
    url = new(client)
    send(client, url, "x" * 1000)
    sqs.faults(miss=1)
    assert bodies(client, url) == []
    sqs.plan("ReceiveMessage", "slow")
    started = time.monotonic()
    assert bodies(client, url, WaitTimeSeconds=1) == ["x" * 1000]
    assert time.monotonic() - started > 0.15


def test_latency_is_waited(sqs: StandIn, client: Any) -> None:
    url = new(client)
    sqs.faults(latency_ms=150, jitter_ms=1)
    started = time.monotonic()
    send(client, url, "x")
    assert time.monotonic() - started >= 0.15


def test_pause_holds_requests_until_resume(sqs: StandIn, client: Any) -> None:
    url, hasty = new(client), connect(sqs.url, read_timeout=0.2)
    sqs.pause()
    with pytest.raises(botocore.exceptions.ReadTimeoutError):
        send(hasty, url, "kept")
    hasty.close()
    assert sqs.ledger()["held"] == 1
    assert sqs.ledger()["queues"][name_of(url)]["sent"] == 0
    sqs.resume()
    assert bodies(client, url) == ["kept"]


def test_shuffle_hands_out_everything_in_another_order() -> None:
    with served(shuffle=20) as (_, client):
        url = new(client)
        sent = [str(number) for number in range(30)]
        send(client, url, *sent)
        found = [body for _ in range(3) for body in bodies(client, url)]
        assert found != sent
        assert sorted(found, key=int) == sent


def test_unknown_faults_are_refused(sqs: StandIn) -> None:
    with pytest.raises(ValueError, match="typhoon"):
        sqs.faults(typhoon=1)
    with pytest.raises(ValueError, match="typhoon"):
        sqs.plan("SendMessage", "typhoon")


# Credentials, the ledger, the process.


def test_credentials_are_asked_for_and_may_expire(sqs: StandIn, client: Any) -> None:
    unsigned = connect(sqs.url, signature_version=UNSIGNED)
    assert code_of(unsigned.list_queues) == "MissingAuthenticationToken"
    unsigned.close()
    sqs.keys(key="another")
    assert code_of(client.list_queues) == "InvalidClientTokenId"
    sqs.keys(key="testing", expire=["testing"])
    assert code_of(client.list_queues) == "ExpiredToken"
    sqs.keys(key="", renew=["testing"])
    client.list_queues()


def test_ledger_counts_requests_and_bytes(sqs: StandIn, client: Any) -> None:
    url = new(client)
    send(client, url, "x" * 10_000)
    receive(client, url)
    ledger = sqs.ledger()
    assert ledger["requests"]["SendMessage"]["requests"] == 1
    assert 10_000 < ledger["requests"]["SendMessage"]["bytes_in"] < 12_000
    assert 10_000 < ledger["requests"]["ReceiveMessage"]["bytes_out"] < 12_000
    assert ledger["cpu_seconds"] > 0
    sqs.reset()
    assert sqs.ledger()["requests"] == sqs.ledger()["queues"] == {}


def test_process_ends_with_its_standard_input() -> None:
    here = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-m", "standin", "--latency-ms", "5"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=here,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert int(server.stdout.readline()) > 0
        server.stdin.close()
        assert server.wait(20) == 0


def test_process_ends_with_whoever_started_it() -> None:
    program = "import os, signal, standin as t; m = t.standin(); print(m.__enter__().pid, flush=True); signal.pause()"
    here = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=here) as starter:
        assert starter.stdout is not None
        server = psutil.Process(int(starter.stdout.readline()))
        starter.kill()
    server.wait(20)
    assert not server.is_running()
