"""ReceiveMessage, and the operations on receipt handles: delete, change visibility."""

from collections.abc import Callable
from typing import Any

from standin import rules
from standin.errors import SqsError, missing
from standin.line import Waiter
from standin.message import Message, rendered
from standin.queue import LONGEST, Queue
from standin.send import failure, results
from standin.service import Call, Operation, Service

Deliveries = list[tuple[Message, str]]


def receive_message(service: Service, call: Call) -> str | None:
    queue, request, now = service.queue(call.request), call.request, service.clock.now()
    count = rules.check_number("MaxNumberOfMessages", request.get("MaxNumberOfMessages", 1), 1, 10)
    default = int(queue.attributes["ReceiveMessageWaitTimeSeconds"])
    wait = rules.check_number("WaitTimeSeconds", request.get("WaitTimeSeconds", default), 0, 20)
    default = int(queue.attributes["VisibilityTimeout"])
    hidden = rules.check_number("VisibilityTimeout", request.get("VisibilityTimeout", default), 0, LONGEST)
    attempt = request.get("ReceiveRequestAttemptId")
    rules.check_receive(attempt, fifo=queue.fifo)
    system = frozenset(request.get("MessageSystemAttributeNames") or request.get("AttributeNames") or ())
    if service.options.uncounted:
        system -= {"ApproximateReceiveCount", "All"}
    wanted = request.get("MessageAttributeNames") or ()

    def shown(found: Deliveries) -> str:
        if attempt is not None and found:
            queue.remember(attempt, found, hidden, service.clock.now())
        return '{"Messages":[' + ",".join(rendered(m, receipt, system, wanted) for m, receipt in found) + "]}"

    def look() -> Deliveries:
        return queue.receive(count, hidden, service.clock.now(), service.clock.now_ms())

    if attempt is not None:
        repeated = queue.again(attempt, now)
        if repeated is not None:
            return shown(repeated)
    if wait == 0 and service.dice.misses():
        return "{}"
    found = look()
    if found:
        return shown(found)
    if wait:
        _wait(service, call, queue, wait, look, shown)
        return None
    if queue.in_flight >= queue.limit and not queue.fifo:
        raise SqsError("OverLimit", f"The maximum number of in flight messages is reached: {queue.limit}.")
    return "{}"


def _wait(
    service: Service,
    call: Call,
    queue: Queue,
    seconds: int,
    look: Callable[[], Deliveries],
    shown: Callable[[Deliveries], str],
) -> None:
    def serve() -> bool:
        found = look()
        if found:
            call.reply(shown(found))
        return bool(found)

    def give_up() -> None:
        if service.queues.get(queue.name) is queue:
            call.reply("{}")
        else:
            call.reply(SqsError("QueueDoesNotExist", "The specified queue does not exist."))

    waiter = Waiter(serve, give_up)
    call.withdraw = waiter.close
    queue.line.wait(waiter, seconds)


def delete_message(service: Service, call: Call) -> str:
    queue = service.queue(call.request)
    queue.delete(_receipt(call.request), service.clock.now())
    queue.line.stir()
    return "{}"


def change_message_visibility(service: Service, call: Call) -> str:
    queue = service.queue(call.request)
    queue.change(_receipt(call.request), _visibility(call.request), service.clock.now())
    queue.line.stir()
    return "{}"


def delete_message_batch(service: Service, call: Call) -> str:
    queue, now = service.queue(call.request), service.clock.now()

    def delete(entry: dict[str, Any]) -> None:
        try:
            queue.delete(_receipt(entry), now)
        except SqsError as error:
            # The error that is InvalidParameterValue in a single call has a code of its own in a batch.
            raise SqsError("ReceiptHandleIsInvalid", error.message) from None

    return _each(service, call, queue, delete)


def change_message_visibility_batch(service: Service, call: Call) -> str:
    queue, now = service.queue(call.request), service.clock.now()
    entries = call.request.get("Entries") or []
    for entry in entries:
        _visibility(entry)
    return _each(service, call, queue, lambda entry: queue.change(_receipt(entry), _visibility(entry), now))


def _each(service: Service, call: Call, queue: Queue, do: Callable[[dict[str, Any]], None]) -> str:
    entries = call.request.get("Entries") or []
    rules.check_entries(entries)
    accepted, failed = [], []
    for position, entry in enumerate(entries):
        if service.dice.entry_fails(call.operation, call.fate, position):
            failed.append(failure(entry["Id"], None))
            continue
        try:
            do(entry)
        except SqsError as error:
            service.refused(call, error)
            failed.append(failure(entry["Id"], error))
        else:
            accepted.append(f'{{"Id":"{entry["Id"]}"}}')
    queue.line.stir()
    return results(accepted, failed)


def _receipt(request: dict[str, Any]) -> str:
    receipt = request.get("ReceiptHandle")
    if not isinstance(receipt, str) or not receipt:
        raise missing("ReceiptHandle")
    return receipt


def _visibility(request: dict[str, Any]) -> int:
    value = request.get("VisibilityTimeout")
    if value is None:
        raise missing("VisibilityTimeout")
    return rules.check_number("VisibilityTimeout", value, 0, LONGEST, f"Must be between 0 and {LONGEST}.")


RECEIVE: dict[str, Operation] = {
    "ReceiveMessage": receive_message,
    "DeleteMessage": delete_message,
    "DeleteMessageBatch": delete_message_batch,
    "ChangeMessageVisibility": change_message_visibility,
    "ChangeMessageVisibilityBatch": change_message_visibility_batch,
}
