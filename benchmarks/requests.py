"""Measure the CPU of one call to SQS, made in four ways, for one kept connection each.

The ways: the lean path; urllib3's requests and replies with the lean path's signature; the lean path with botocore's
signature; boto3. One process makes them in turn, against the stand-in on loopback. A cycle sends ten messages, receives
and deletes them: three calls. The figure is the CPU of this process alone.

``--certificate``: PEM file with key and certificate of 127.0.0.1, signed by itself: the same over TLS. One is made by
``openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -subj /CN=localhost -addext
subjectAltName=IP:127.0.0.1 -keyout tls.pem -out tls.crt && cat tls.crt >> tls.pem``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import boto3
import botocore.auth
import botocore.awsrequest
import botocore.config
import botocore.credentials
import botocore.httpsession
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util.ssl_ import create_urllib3_context

from benchmarks.harness import Report, Spread, bars, interleave, parse
from benchmarks.queues import sqs_standin
from sqspipes_mp.brokers.base import QueueSpec
from sqspipes_mp.brokers.sqs.broker import _config
from sqspipes_mp.brokers.sqs.calls import _METHODS
from sqspipes_mp.brokers.sqs.connection import SqsConnection
from sqspipes_mp.brokers.sqs.http import Signer, parse_reply

Call = Callable[[str, dict[str, Any]], dict[str, Any]]

#: Cycles of three calls in a sample.
CYCLES = 100


def lean_path(connection: SqsConnection, *, signer: Any = None) -> Call:
    """Make calls by the lean path; ``signer``: instead of its own."""
    lean = connection._calls._lean
    assert lean is not None
    if signer is not None:
        lean._signer = signer
    return lambda operation, params: lean(operation, params, 30)


class BotocoreSigner:
    """The signer's place taken by ``botocore.auth.SigV4Auth``."""

    def headers(self, keys: Any, authority: str, operation: str, body: bytes, when: object) -> str:  # noqa: ARG002
        request = botocore.awsrequest.AWSRequest(
            "POST",
            f"http://{authority}/",
            {
                "Content-Type": "application/x-amz-json-1.0",
                "Host": authority,
                "X-Amz-Target": f"AmazonSQS.{operation}",
                "x-amzn-query-mode": "true",
            },
            body,
        )
        botocore.auth.SigV4Auth(keys, "sqs", "us-east-1").add_auth(request)
        return "".join([f"{name}: {value}\r\n" for name, value in request.headers.items()])


def urllib3_requests(url: str, bundle: str) -> Call:
    """Make calls with urllib3's connection, its requests and its replies, and the lean path's signature."""
    signer, keys = Signer("us-east-1"), botocore.credentials.ReadOnlyCredentials("bench", "bench", None)
    parts = urllib3.util.parse_url(url)
    authority = f"{parts.host}:{parts.port}"
    if not bundle:
        connection = HTTPConnection(str(parts.host), parts.port, timeout=30)
    else:
        context = create_urllib3_context()
        context.load_verify_locations(bundle)
        connection = HTTPSConnection(str(parts.host), parts.port, timeout=30, ssl_context=context)
    connection.connect()
    used = False

    def call(operation: str, params: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps(params, separators=(",", ":")).encode()
        # A new connection over TLS has the server's session tickets waiting.
        nonlocal used
        assert not used or connection.is_connected
        used = True
        head = signer.headers(keys, authority, operation, body, time.gmtime())
        fields = dict([line.split(": ", 1) for line in head.splitlines()])
        fields["user-agent"] = "sqspipes-mp"
        fields["accept-encoding"] = "identity"
        connection.request("POST", "/", body, fields, preload_content=False, decode_content=False)
        reply = connection.getresponse()
        content = reply.read()
        return parse_reply(reply.status, {}, content)

    return call


def boto3_client(url: str) -> Call:
    """Make calls with a boto3 client that is configured as the engine's."""
    client = boto3.Session("bench", "bench", region_name="us-east-1").client(
        "sqs", endpoint_url=url, config=_config(30)
    )
    return lambda operation, params: getattr(client, _METHODS[operation])(**params)


def cycle(call: Call, queue: str) -> None:
    """Send ten messages, receive and delete them."""
    body = json.dumps({"meta": {"priority": 0}, "value": {"path": "x" * 100}})
    call(
        "SendMessageBatch",
        {"QueueUrl": queue, "Entries": [{"Id": str(n), "MessageBody": body} for n in range(10)]},
    )
    found = call(
        "ReceiveMessage",
        {
            "QueueUrl": queue,
            "MaxNumberOfMessages": 10,
            "WaitTimeSeconds": 0,
            "VisibilityTimeout": 60,
            "MessageSystemAttributeNames": ["ApproximateReceiveCount", "SentTimestamp", "MessageGroupId"],
        },
    )["Messages"]
    assert len(found) == 10
    entries = [{"Id": str(n), "ReceiptHandle": each["ReceiptHandle"]} for n, each in enumerate(found)]
    call("DeleteMessageBatch", {"QueueUrl": queue, "Entries": entries})


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--certificate", metavar="FILE", help="measure over TLS as well, with this key and certificate")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each way on plain HTTP, and over TLS."""
    options = parse(__doc__, argv, _options)
    report = Report("requests", options)
    cycles = 5 if options.quick else CYCLES
    rows: list[list[object]] = []
    drawn: dict[str, list[Spread]] = {}
    labels = ["plain HTTP", "over TLS"] if options.certificate else ["plain HTTP"]
    for label in labels:
        bundle = options.certificate if label == "over TLS" else ""
        os.environ["AWS_CA_BUNDLE"] = bundle or botocore.httpsession.get_cert_path(verify=True)
        spreads = measure(bundle, cycles, options.rounds)
        for way, spread in spreads.items():
            report.keep(f"{way}, {label}", spread)
            drawn.setdefault(way, []).append(spread)
            rows.append([label, way, spread.text(0), spread.over(spreads["the lean path"]).text()])
    report.table("Microseconds of CPU per call", ["wire", "way", "CPU", "over the lean path's"], rows)
    report.finish(partial(_draw, labels, drawn))


def measure(bundle: str, cycles: int, rounds: int) -> dict[str, Spread]:
    """Return the microseconds of each way. ``bundle``: certificate of the stand-in, "": it speaks plain HTTP."""
    with contextlib.ExitStack() as stack:
        server, fresh = stack.enter_context(sqs_standin(certificate=bundle))
        broker = fresh()
        connection, other = [stack.enter_context(contextlib.closing(broker.open())) for _ in range(2)]
        connection.ensure([QueueSpec(name="bench", fifo=False, visibility=60)], create=True)
        queue = connection.address("bench")
        calls: dict[str, Call] = {
            "the lean path": lean_path(connection),
            "urllib3's requests, own signature": urllib3_requests(server.url, bundle),
            "own requests, botocore's signature": lean_path(other, signer=BotocoreSigner()),
            "boto3": boto3_client(server.url),
        }
        for call in calls.values():
            cycle(call, queue)

        def subject(call: Call) -> float:
            start = time.process_time()
            for _ in range(cycles):
                cycle(call, queue)
            return (time.process_time() - start) / cycles / 3 * 1e6

        return interleave({way: partial(subject, call) for way, call in calls.items()}, rounds)


def _draw(labels: list[str], drawn: dict[str, list[Spread]], figure: Any) -> None:
    axes = figure.subplots()
    bars(axes, labels, drawn)
    axes.set_ylabel("microseconds of CPU per call")


if __name__ == "__main__":
    main()
