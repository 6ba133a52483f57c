"""The IAM policy of a run over SQS. Pure.

Actions and ARNs: Service Authorization Reference, Amazon SQS and AWS KMS. The batch operations need the right of the
single one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

from sqspipes_mp.brokers.rights import Use
from sqspipes_mp.brokers.sqs.queues import Address, parse_address

_LOOK = ("sqs:GetQueueUrl", "sqs:GetQueueAttributes")
_RECEIVE = ("sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:ChangeMessageVisibility")
_SEND = ("sqs:SendMessage",)
_KMS = ("kms:Decrypt", "kms:GenerateDataKey")


def make_policy(uses: Sequence[Use], *, region: str, create: bool, tagged: bool, kms_key: str | None) -> dict[str, Any]:
    """Return a policy of exactly these queues; their account is any, where neither URL nor ARN has it.

    ``tagged``: whether new queues get tags; ``kms_key``: id, ARN or alias.
    """
    partition = partition_of(region)
    owned = [use for use in uses if use.spec.owned]
    making = ("sqs:CreateQueue", *(("sqs:TagQueue",) if tagged else ()))
    parts = [
        ("Look", _LOOK, uses),
        ("Receive", _RECEIVE, [use for use in uses if use.receives]),
        ("Send", _SEND, [use for use in uses if use.sends]),
        ("Create", making, owned if create else ()),
    ]
    statements: list[dict[str, Any]] = [
        _statement(name, actions, (_arn(use, region, partition) for use in used))
        for name, actions, used in parts
        if used
    ]
    if kms_key is not None:
        statements.append(_key_statement(kms_key, region, partition))
    return {"Version": "2012-10-17", "Statement": statements}


def partition_of(region: str) -> str:
    """Return the partition of a region, the second field of its ARNs."""
    return "aws-cn" if region.startswith("cn-") else "aws-us-gov" if region.startswith("us-gov-") else "aws"


def _statement(name: str, actions: Sequence[str], resources: Iterable[str]) -> dict[str, Any]:
    return {"Sid": name, "Effect": "Allow", "Action": list(actions), "Resource": sorted(set(resources))}


def _arn(use: Use, region: str, partition: str) -> str:
    if use.spec.name.startswith("arn:"):
        return use.spec.name
    address = parse_address(use.spec.name)
    return f"arn:{partition}:sqs:{address.region or region}:{_account(address) or '*'}:{address.name}"


def _account(address: Address) -> str | None:
    """Return the account in a queue's address: of its ARN, or the folder of its URL."""
    folder = urlsplit(address.url or "").path.rpartition("/")[0].strip("/")
    return address.account or (folder if folder.isdecimal() else None)


def _key_statement(key: str, region: str, partition: str) -> dict[str, Any]:
    """Return the statement for a KMS key; an alias stands in a condition, as no ARN of a right names one."""
    alias = key.rpartition(":")[2] if "alias/" in key else None
    if alias is not None:
        statement = _statement("Key", _KMS, [f"arn:{partition}:kms:{region}:*:key/*"])
        return statement | {"Condition": {"ForAnyValue:StringEquals": {"kms:ResourceAliases": alias}}}
    arn = key if key.startswith("arn:") else f"arn:{partition}:kms:{region}:*:key/{key}"
    return _statement("Key", _KMS, [arn])
