"""Checks of the queue service and its queues. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from sqspipes_mp.brokers.examined import ExaminedQueue
from sqspipes_mp.cli.doctor.facts import Facts
from sqspipes_mp.cli.doctor.findings import Finding, fail, ok, warn

#: Seconds of difference between the clocks above which times are wrong, and from which SQS refuses a signature (AWS
#: General Reference, "Signing AWS API requests": a request must arrive within five minutes of its time stamp).
_OFF, _REFUSED = 10.0, 300.0
#: Receives below which a redrive of others may take messages that were never begun.
_FEW_RECEIVES = 10
_DAY = 86_400


def service(facts: Facts) -> Iterator[Finding]:
    """Tell whether the service answers, where it is, and where the credentials come from."""
    found = facts.examined
    if found.trouble:
        yield fail(
            "queue service", found.trouble, "no message can be sent or received",
            "what the text says" if found.service != "sqs" else "what the text says; aws sts get-caller-identity",
        )  # fmt: skip
        return
    where = found.region or found.file or found.service
    yield ok("queue service", where + (f", credentials from {found.credentials}" if found.credentials else ""))


def clock(facts: Facts) -> Iterator[Finding]:
    """Compare this machine's clock with the service's."""
    ahead = facts.examined.clock_ahead
    if ahead is None:
        return
    seen = f"{abs(ahead):.0f} s {'behind' if ahead > 0 else 'ahead of'} the service's"
    cure = "synchronise the clock: timedatectl set-ntp true, or chronyc makestep"
    if abs(ahead) >= _REFUSED:
        yield fail("clock", seen, "SQS refuses signatures that are five minutes off", cure)
    elif abs(ahead) >= _OFF:
        yield warn("clock", seen, "delays, waiting times and the times of dead letters are wrong by as much", cure)
    else:
        yield ok("clock", f"{abs(ahead):.0f} s from the service's")


def queues(facts: Facts) -> Iterator[Finding]:
    """Tell which queues are there, and which cannot be asked about."""
    found = facts.examined.queues
    refused = [queue for queue in found if queue.trouble]
    for queue in refused:
        yield fail(
            "queues", f"{queue.spec.name}: {queue.trouble}", "the run could not use it",
            f"grant what this prints: sqspipes-mp doctor {facts.target} --iam",
        )  # fmt: skip
    missing = [queue for queue in found if queue.exists is False]
    for queue in missing:
        if not queue.spec.owned:
            yield fail(
                "queues", f"{queue.spec.name} is not there", "it is a queue of others, which is never created here",
                "check Task(input=): name, region and account",
            )  # fmt: skip
        elif not facts.plan.settings.create_queues:
            yield fail(
                "queues", f"{queue.spec.name} is not there", "create_queues=False: the run refuses to start",
                f"create it, or run once with create_queues=True: sqspipes-mp run {facts.target}",
            )  # fmt: skip
    if found and not any(queue.trouble or _lacks(facts, queue) for queue in found):
        there = sum(queue.exists is True for queue in found)
        new = f"; the first run creates {len(missing)}" if missing else ""
        yield ok("queues", f"{there} of {len(found)} are there{new}")


def _lacks(facts: Facts, queue: ExaminedQueue) -> bool:
    return queue.exists is False and not (queue.spec.owned and facts.plan.settings.create_queues)


def attributes(facts: Facts) -> Iterator[Finding]:
    """Tell the attributes that differ from those of queues that the engine creates."""
    for queue in facts.examined.queues:
        if queue.differences:
            yield warn(
                "attributes",
                f"{queue.spec.name}: {'; '.join(queue.differences)}",
                "the queue is used as it is: messages may expire, be refused or be moved too early",
                f"aws sqs set-queue-attributes --queue-url URL_OF_{queue.spec.name} --attributes ..., or delete it "
                "while it is empty: the next run creates it anew",
            )  # fmt: skip


def retention(facts: Facts) -> Iterator[Finding]:
    """Compare how long queues and their dead-letter queues keep messages."""
    by_name = {queue.spec.name: queue for queue in facts.examined.queues}
    for queue in facts.examined.queues:
        dead = by_name.get(queue.spec.dead or "")
        if dead is None or not queue.retention or not dead.retention or dead.retention >= queue.retention:
            continue
        yield warn(
            "retention",
            f"{dead.spec.name} keeps messages {dead.retention / _DAY:.3g} days, {queue.spec.name} "
            f"{queue.retention / _DAY:.3g}",
            "a message that SQS itself moves keeps its first time stamp, and may be gone before anybody looks",
            f"aws sqs set-queue-attributes --queue-url URL_OF_{dead.spec.name} --attributes "
            "MessageRetentionPeriod=1209600",
        )


def redrive(facts: Facts) -> Iterator[Finding]:
    """Look for a redrive of others that counts receives of messages that were never begun."""
    for queue in facts.examined.queues:
        count = queue.redrive_after
        if not queue.spec.owned and queue.spec.ahead and count is not None and count < _FEW_RECEIVES:
            yield warn(
                "redrive",
                f"{queue.spec.name}: SQS moves a message away after {count} receives",
                "a message that was held ahead when its worker ended was received, though it never ran",
                f"Task(prefetch=0), or a maxReceiveCount of {_FEW_RECEIVES} and more",
            )


def dead_letters(facts: Facts) -> Iterator[Finding]:
    """Tell of dead letters that wait for somebody to look at them."""
    dead = {stage.dead for stage in facts.plan.pipeline.stages} - {None}
    waiting = [queue for queue in facts.examined.queues if queue.spec.name in dead and queue.messages]
    for queue in waiting:
        yield warn(
            "dead letters",
            f"{queue.messages} in {queue.spec.name}",
            "work that was given up; SQS deletes it after the queue's retention",
            f"sqspipes-mp dead list {facts.target}",
        )
    if not waiting and any(queue.spec.name in dead and queue.messages is not None for queue in facts.examined.queues):
        yield ok("dead letters", "none")


CHECKS = (service, clock, queues, attributes, retention, redrive, dead_letters)
