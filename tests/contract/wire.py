"""A loopback server that speaks SQS's wire and says exactly what a test wants: for failures moto cannot produce."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Error:
    """An answer that is an error: SQS's query-compatible code, and the HTTP status."""

    code: str
    message: str = "because the test says so"
    status: int = 400


@dataclass
class Wire:
    """What was asked so far, and where. Answers come from ``answer(operation, request, nth call of the operation)``."""

    answer: Callable[[str, Json, int], Json | Error | None]
    url: str = ""
    asked: list[tuple[str, Json]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def requests(self, operation: str) -> list[Json]:
        """Return the requests of one operation, in order."""
        return [request for name, request in self.asked if name == operation]

    def reply(self, operation: str, request: Json) -> Json | Error:
        with self.lock:
            nth = len(self.requests(operation))
            self.asked.append((operation, request))
        answer = self.answer(operation, request, nth)
        return success(operation, request) if answer is None else answer


def success(operation: str, request: Json) -> Json:
    """Return what SQS says when all is well."""
    if operation == "GetQueueUrl":
        return {"QueueUrl": f"http://127.0.0.1/1/{request['QueueName']}"}
    if operation == "CreateQueue":
        return {"QueueUrl": f"http://127.0.0.1/1/{request['QueueName']}"}
    if operation == "GetQueueAttributes":
        name = request["QueueUrl"].rpartition("/")[2]
        return {"Attributes": {"QueueArn": f"arn:aws:sqs:us-east-1:1:{name}"}}
    if operation.endswith("Batch"):
        return batch(request, {})
    return {}


def batch(request: Json, failed: dict[int, tuple[str, bool]]) -> Json:
    """Answer a batch; ``failed``: (code, sender's fault) by position."""
    ids = [entry["Id"] for entry in request["Entries"]]
    return {
        "Successful": [{"Id": i, "MessageId": f"m-{i}"} for n, i in enumerate(ids) if n not in failed],
        "Failed": [
            {"Id": ids[n], "Code": code, "SenderFault": fault, "Message": "because the test says so"}
            for n, (code, fault) in failed.items()
        ],
    }


@contextlib.contextmanager
def served(answer: Callable[[str, Json, int], Json | Error | None]) -> Iterator[Wire]:
    """Serve the answers on a free loopback port."""
    wire = Wire(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
            reply = wire.reply(self.headers["X-Amz-Target"].partition(".")[2], request)
            if isinstance(reply, Error):
                body = json.dumps({"__type": reply.code, "message": reply.message}).encode()
                self.send_response(reply.status)
                self.send_header("x-amzn-query-error", f"{reply.code};Sender")
            else:
                body = json.dumps(reply).encode()
                self.send_response(200)
            self.send_header("Content-Type", "application/x-amz-json-1.0")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        wire.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield wire
        finally:
            server.shutdown()
            thread.join()
