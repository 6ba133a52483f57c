"""The operations on queues: create, find, list, attributes, delete, purge, tags."""

import json
from collections.abc import Mapping
from typing import Any

from standin import rules
from standin.errors import SqsError, invalid, missing
from standin.queue import Queue
from standin.service import Call, Json, Operation, Service

_COUNTS = ("ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible", "ApproximateNumberOfMessagesDelayed")
_DERIVED = (*_COUNTS, "QueueArn", "CreatedTimestamp", "LastModifiedTimestamp", "All")
_KNOWN = {*rules.NUMBERS, "Policy", "RedrivePolicy", "RedriveAllowPolicy", "KmsMasterKeyId", "SqsManagedSseEnabled"}
_FIFO_DEFAULTS = {
    "FifoQueue": "true",
    "ContentBasedDeduplication": "false",
    "DeduplicationScope": "queue",
    "FifoThroughputLimit": "perQueue",
}


def create_queue(service: Service, call: Call) -> str:
    request = call.request
    name, given = request.get("QueueName"), request.get("Attributes", {})
    if not name:
        raise missing("QueueName")
    fifo = given.get("FifoQueue") == "true"
    rules.check_name(name, fifo=fifo)
    rules.check_queue_attributes(given, fifo=fifo)
    found = service.queues.get(name)
    if found is not None:
        for attribute, value in given.items():
            if _comparable(found.attributes.get(attribute)) != _comparable(value):
                text = "A queue already exists with the same name and a different value for attribute "
                raise SqsError("QueueNameExists", text + attribute)
        return json.dumps({"QueueUrl": _url(service, found)})
    if service.clock.now() < service.deleted.get(name, 0):
        text = "You must wait 60 seconds after deleting a queue before you can create another with the same name."
        raise SqsError("QueueDeletedRecently", text)
    queue = service.new_queue(name, fifo=fifo)
    queue.attributes = {n: str(default) for n, (_, _, default) in rules.NUMBERS.items() if default is not None}
    queue.attributes["SqsManagedSseEnabled"] = "true"
    if fifo:
        queue.attributes |= _FIFO_DEFAULTS
    _set(service, queue, given)
    queue.tags = dict(request.get("tags", {}))
    service.queues[name] = queue
    return json.dumps({"QueueUrl": _url(service, queue)})


def get_queue_url(service: Service, call: Call) -> str:
    name, account = call.request.get("QueueName"), call.request.get("QueueOwnerAWSAccountId")
    if not name:
        raise missing("QueueName")
    queue = service.queues.get(name)
    if queue is None or account not in (None, service.options.account):
        raise SqsError("QueueDoesNotExist", "The specified queue does not exist.")
    return json.dumps({"QueueUrl": _url(service, queue)})


def list_queues(service: Service, call: Call) -> str:
    prefix = call.request.get("QueueNamePrefix", "")
    names = sorted(name for name in service.queues if name.startswith(prefix))
    return _page(service, call.request, names, "QueueUrls")


def list_dead_letter_source_queues(service: Service, call: Call) -> str:
    target = service.queue(call.request)
    names = sorted(queue.name for queue in service.queues.values() if queue.target is target)
    page = json.loads(_page(service, call.request, names, "queueUrls"))
    return json.dumps({"queueUrls": [], **page})


def get_queue_attributes(service: Service, call: Call) -> str:
    queue = service.queue(call.request)
    wanted = call.request.get("AttributeNames", [])
    for name in wanted:
        if name not in _KNOWN and name not in _DERIVED and name not in _FIFO_DEFAULTS:
            raise SqsError("InvalidAttributeName", f"Unknown Attribute {name}.")
    queue.show_due(service.clock.now())
    every = {
        **queue.attributes,
        **dict(zip(_COUNTS, map(str, (queue.visible, queue.in_flight, queue.delayed)), strict=True)),
        "QueueArn": queue.arn,
        "CreatedTimestamp": str(queue.created),
        "LastModifiedTimestamp": str(queue.changed),
    }
    shown = every if "All" in wanted else {name: every[name] for name in wanted if name in every}
    return json.dumps({"Attributes": shown} if shown else {})


def set_queue_attributes(service: Service, call: Call) -> str:
    queue = service.queue(call.request)
    given = call.request.get("Attributes", {})
    if "FifoQueue" in given and given["FifoQueue"] != str(queue.fifo).lower():
        text = "Invalid value for the parameter FifoQueue. Reason: Modifying queue type is not supported."
        raise SqsError("InvalidAttributeValue", text)
    scope = {n: v for n, v in queue.attributes.items() if n == "DeduplicationScope"}
    rules.check_queue_attributes({**scope, **given}, fifo=queue.fifo)
    _set(service, queue, given)
    return "{}"


def delete_queue(service: Service, call: Call) -> str:
    queue = service.queue(call.request)
    del service.queues[queue.name]
    for other in service.queues.values():
        if other.target is queue:
            other.target = None
    queue.purge()
    queue.line.dismiss()
    if service.options.delete_window:
        service.deleted[queue.name] = service.clock.now() + service.options.delete_window
    return "{}"


def purge_queue(service: Service, call: Call) -> str:
    queue, now = service.queue(call.request), service.clock.now()
    if now < queue.purged_until:
        text = f"Only one PurgeQueue operation on {queue.name} is allowed every 60 seconds."
        raise SqsError("PurgeQueueInProgress", text)
    queue.purged_until = now + service.options.purge_window
    queue.purge()
    return "{}"


def tag_queue(service: Service, call: Call) -> str:
    service.queue(call.request).tags.update(call.request.get("Tags", {}))
    return "{}"


def untag_queue(service: Service, call: Call) -> str:
    tags = service.queue(call.request).tags
    for name in call.request.get("TagKeys", []):
        tags.pop(name, None)
    return "{}"


def list_queue_tags(service: Service, call: Call) -> str:
    tags = service.queue(call.request).tags
    return json.dumps({"Tags": tags} if tags else {})


def _url(service: Service, queue: Queue) -> str:
    return f"http://127.0.0.1:{service.options.port}/{service.options.account}/{queue.name}"


def _page(service: Service, request: Json, names: list[str], key: str) -> str:
    most = request.get("MaxResults")
    rules.check_number("MaxResults", 1000 if most is None else most, 1, 1000)
    after = request.get("NextToken", "")
    rest = [name for name in names if name > after]
    shown = rest[: most or 1000]
    page: dict[str, Any] = {key: [_url(service, service.queues[name]) for name in shown]} if shown else {}
    if most is not None and len(rest) > len(shown):
        page["NextToken"] = shown[-1]
    return json.dumps(page)


def _set(service: Service, queue: Queue, given: Mapping[str, str]) -> None:
    policy = given.get("RedrivePolicy")
    if policy:
        arn, most = rules.redrive(policy)
        target = service.queues.get(arn.rpartition(":")[2])
        if target is None or target.arn != arn:
            raise invalid("RedrivePolicy", policy, "Dead letter target does not exist.")
        if target.fifo != queue.fifo:
            raise invalid("RedrivePolicy", policy, "Dead-letter queue must be same type of queue as the source.")
        queue.target, queue.most_receives = target, most
    elif policy == "":
        queue.target = None
    queue.attributes.update(given)
    if given.get("KmsMasterKeyId"):
        queue.attributes["SqsManagedSseEnabled"] = "false"
    for name in ("RedrivePolicy", "Policy", "RedriveAllowPolicy", "KmsMasterKeyId"):
        if queue.attributes.get(name) == "":
            del queue.attributes[name]
    queue.changed = service.clock.now_ms() // 1000


def _comparable(value: str | None) -> object:
    """Return an attribute's value for a comparison: JSON as its object."""
    return json.loads(value) if value and value.startswith("{") else value


MANAGE: dict[str, Operation] = {
    "CreateQueue": create_queue,
    "GetQueueUrl": get_queue_url,
    "ListQueues": list_queues,
    "ListDeadLetterSourceQueues": list_dead_letter_source_queues,
    "GetQueueAttributes": get_queue_attributes,
    "SetQueueAttributes": set_queue_attributes,
    "DeleteQueue": delete_queue,
    "PurgeQueue": purge_queue,
    "TagQueue": tag_queue,
    "UntagQueue": untag_queue,
    "ListQueueTags": list_queue_tags,
}
