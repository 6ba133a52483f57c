"""SendMessage and SendMessageBatch."""

import hashlib
from collections.abc import Mapping
from typing import Any

from standin import rules
from standin.errors import SqsError
from standin.message import Message, attributes_md5, md5, quoted, sequence
from standin.queue import Queue
from standin.service import Call, Operation, Service

Entry = Mapping[str, Any]


def send_message(service: Service, call: Call) -> str:
    queue, request = service.queue(call.request), call.request
    rules.check_present(request, fifo=queue.fifo, content_based=_content_based(queue))
    rules.check_message(request, rules.size_of(request), fifo=queue.fifo, longest=_longest(queue))
    result = "{" + _accept(service, queue, request, service.clock.now(), service.clock.now_ms()) + "}"
    queue.line.stir()
    return result


def send_message_batch(service: Service, call: Call) -> str:
    queue, entries = service.queue(call.request), call.request.get("Entries") or []
    rules.check_entries(entries)
    content_based, longest = _content_based(queue), _longest(queue)
    for entry in entries:
        rules.check_present(entry, fifo=queue.fifo, content_based=content_based)
    sizes = [rules.size_of(entry) for entry in entries]
    rules.check_total(sizes)
    now, now_ms = service.clock.now(), service.clock.now_ms()
    accepted, failed = [], []
    for position, (entry, size) in enumerate(zip(entries, sizes, strict=True)):
        try:
            if service.dice.entry_fails(call.operation, call.fate, position):
                failed.append(failure(entry["Id"], None))
                continue
            rules.check_message(entry, size, fifo=queue.fifo, longest=longest)
        except SqsError as error:
            service.refused(call, error)
            failed.append(failure(entry["Id"], error))
        else:
            accepted.append(f'{{"Id":"{entry["Id"]}",{_accept(service, queue, entry, now, now_ms)}}}')
    queue.line.stir()
    return results(accepted, failed)


def results(accepted: list[str], failed: list[str]) -> str:
    """Return a batch's reply."""
    return f'{{"Successful":[{",".join(accepted)}],"Failed":[{",".join(failed)}]}}'


def failure(name: str, error: SqsError | None) -> str:
    """Return a failed entry of a batch's reply; ``error`` None: the service failed, not the client."""
    if error is None:
        return f'{{"Id":"{name}","SenderFault":false,"Code":"InternalError","Message":"Internal error"}}'
    return f'{{"Id":"{name}","SenderFault":true,"Code":"{error.code}","Message":{quoted(error.message)}}}'


def _accept(service: Service, queue: Queue, entry: Entry, now: float, now_ms: int) -> str:
    body = entry["MessageBody"]
    queue.counter += 1
    message = Message(service.new_id(), body, md5(body), queue.counter, now_ms)
    message.group = entry.get("MessageGroupId")
    text = f'"MD5OfMessageBody":"{message.md5}"'
    attributes, system = entry.get("MessageAttributes"), entry.get("MessageSystemAttributes")
    if attributes:
        message.attributes = attributes
        text += f',"MD5OfMessageAttributes":"{attributes_md5(attributes)}"'
    if system:
        trace = system["AWSTraceHeader"]
        message.trace = trace["StringValue"]
        text += f',"MD5OfMessageSystemAttributes":"{attributes_md5({"AWSTraceHeader": trace})}"'
    if not queue.fifo:
        queue.add(message, entry.get("DelaySeconds", int(queue.attributes["DelaySeconds"])), now)
        return f'{text},"MessageId":"{message.id}"'
    given = entry.get("MessageDeduplicationId")
    message.dedup = given or hashlib.sha256(body.encode()).hexdigest()
    original = queue.original(message, now)
    if original is None:
        queue.add(message, int(queue.attributes["DelaySeconds"]), now)
    shown = original or message
    return f'{text},"MessageId":"{shown.id}","SequenceNumber":"{sequence(shown)}"'


def _content_based(queue: Queue) -> bool:
    return queue.attributes.get("ContentBasedDeduplication") == "true"


def _longest(queue: Queue) -> int:
    return int(queue.attributes["MaximumMessageSize"])


SEND: dict[str, Operation] = {"SendMessage": send_message, "SendMessageBatch": send_message_batch}
