"""The cost of requests to SQS: as measured from the engine that runs here, else as benchmarked. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqspipes_mp.pipeline.plan import RunPlan

#: Requests for each message and hop in full batches: a tenth each of a receive, a send and a delete, and some more
#: (``python -m benchmarks.queues``).
ASSUMED = 0.31
#: Messages below which a measured number says little.
_LEAST_DONE = 1_000
#: US dollars for a million requests after the first million of a month.
STANDARD, FIFO = 0.40, 0.50
PRICE_SOURCE = "list price of us-east-1 in June 2026, first tier (https://aws.amazon.com/sqs/pricing/)"
#: Long polls of an idle worker in a day, 20 s each; with several levels, rounds of one second.
_POLLS, _ROUNDS = 86_400 // 20, 86_400
_DAYS = 30.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Requests and US dollars; a message is one value that goes through all stages."""

    #: Whether ``per_hop`` comes from the engine that runs here.
    measured: bool
    #: Requests for each message and hop.
    per_hop: float
    #: Stages that receive.
    hops: int
    #: Share of the receives that brought nothing; None: not measured.
    empty: float | None
    #: US dollars for a million requests.
    price: float
    #: Where the price comes from.
    price_source: str
    #: Requests, and US dollars, for a million messages.
    requests_per_million: float
    usd_per_million: float
    #: Messages a day that the month is made of; None: neither given nor measured.
    per_day: float | None
    usd_per_month: float | None
    #: US dollars a month of all workers, where they are always idle.
    usd_idle_month: float


def cost_of(plan: RunPlan, state: Mapping[str, Any] | None, per_day: float | None) -> Cost:
    """Return the cost of a run. ``per_day``: messages a day; None: as many as the running engine does."""
    receiving = [plan.pipeline.stages[index] for index in plan.selected if not plan.pipeline.stages[index].is_source]
    names = {stage.name for stage in receiving}
    hops = len(receiving)
    price = FIFO if plan.pipeline.fifo else STANDARD
    done = [stage["done"] for stage in (() if state is None else state["stages"]) if stage["name"] in names]
    measured = state is not None and sum(done) >= _LEAST_DONE
    per_hop, empty = ASSUMED, None
    if measured:
        assert state is not None
        requests = state["broker"]["requests"]
        per_hop = sum(requests.values()) / sum(done)
        empty = state["broker"]["empty_receives"] / requests["receive"] if requests["receive"] else 0.0
        if per_day is None and state["engine"]["up"]:
            per_day = done[0] / state["engine"]["up"] * 86_400
    million = per_hop * hops
    return Cost(
        measured=measured,
        per_hop=per_hop,
        hops=hops,
        empty=empty,
        price=price,
        price_source=PRICE_SOURCE,
        requests_per_million=million * 1e6,
        usd_per_million=million * price,
        per_day=per_day,
        usd_per_month=None if per_day is None else per_day * _DAYS * million * price / 1e6,
        usd_idle_month=sum(plan.workers[stage.index] * idle_polls(len(stage.inputs)) for stage in receiving)
        * _DAYS * price / 1e6,
    )  # fmt: skip


def idle_polls(levels: int) -> int:
    """Return the requests of an idle worker in a day (``brokers/sqs/connection.py``, ``receive``)."""
    return _POLLS if levels == 1 else _ROUNDS * (levels + 1)


def as_plain(cost: Cost) -> dict[str, Any]:
    """Return a cost for JSON."""
    return asdict(cost)


def as_text(cost: Cost) -> str:
    """Return a cost as lines."""
    how = (
        "measured since the running engine began"
        if cost.measured
        else f"assumed: no engine of this pipeline that has done {_LEAST_DONE:,} messages runs here"
    )
    hops, million = cost.hops, cost.requests_per_million
    lines = [
        f"requests per message and hop: {cost.per_hop:.2f} ({how})",
        f"1,000,000 messages, {hops} hops: {million:,.0f} requests, {cost.usd_per_million:.2f} USD",
        f"workers that are always idle: {cost.usd_idle_month:,.2f} USD a month at most",
    ]
    if cost.empty is not None:
        lines.insert(1, f"receives that brought nothing: {cost.empty:.0%}")
    if cost.per_day is not None and cost.usd_per_month is not None:
        lines.insert(-1, f"{cost.per_day:,.0f} messages a day: {cost.usd_per_month:,.2f} USD a month")
    lines += [
        f"price: {cost.price:.2f} USD per million requests, {cost.price_source}",
        "not in it: the first million requests of a month are free, and each 64 KiB of a request are billed as one",
    ]
    return "\n".join(lines)
