"""``sqspipes-mp doctor``: all that is wrong before it costs something, the rights, the cost (the command line)."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator

from sqspipes_mp.brokers.rights import policy
from sqspipes_mp.cli.console import Console
from sqspipes_mp.cli.doctor import cost, findings, gain_checks, machine_checks, queue_checks
from sqspipes_mp.cli.doctor.facts import Facts
from sqspipes_mp.cli.doctor.findings import Finding
from sqspipes_mp.cli.doctor.gather import gather, running
from sqspipes_mp.cli.doctor.rights import uses_of
from sqspipes_mp.cli.exits import Exit, Refused
from sqspipes_mp.cli.queues import engine_of
from sqspipes_mp.cli.run import run_options, task_names, worker_counts
from sqspipes_mp.engine import Engine, plan_run
from sqspipes_mp.pipeline.plan import RunPlan

Check = Callable[[Facts], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (*machine_checks.CHECKS, *queue_checks.CHECKS, *gain_checks.CHECKS)
#: Flags of ``run`` that have no meaning here.
_ABSENT = (
    "until",
    "idle",
    "wait_for_broker",
    "on_error",
    "log_level",
    "log_format",
    "progress",
    "summary_json",
    "http",
)
#: Variables of ``run`` that choose what is judged.
_VARIABLES = ("SQSPIPES_ONLY", "SQSPIPES_WORKERS")

EPILOG = """\
examples:
  sqspipes-mp doctor words:engine                   what is wrong here, why it matters, the cure
  sqspipes-mp doctor words:engine --iam --create > policy.json
  sqspipes-mp doctor words:engine --cost --per-day 2000000

Nothing is sent, received or created. Where an engine of this pipeline runs here, its figures are judged, too.
The policy of --iam names these queues in any account that the role reaches: neither right nor request is needed for it.

exit codes: 0 no failure (warnings there may be), 1 a failure, 2 usage
"""


def add_flags(parser: ArgumentParser) -> None:
    """Add the command's own flags."""
    parser.add_argument("--only", metavar="NAME", action="append", help="only this task, as of run (repeatable)")
    parser.add_argument("--workers", metavar="N|NAME=N", action="append", help="as of run (repeatable)")
    parser.add_argument("--iam", action="store_true", help="only the IAM policy that the run needs, as JSON")
    parser.add_argument("--create", action="store_true", help="with --iam: also the rights to create the queues")
    parser.add_argument("--cost", action="store_true", help="only requests and their price")
    parser.add_argument("--per-day", metavar="N", type=float, help="with --cost: messages a day; default: as measured")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(**dict.fromkeys(_ABSENT))


def doctor(flags: Namespace, _console: Console) -> Exit:
    """Judge an engine, its machine and its queues."""
    if flags.create and not flags.iam:
        raise Refused("--create needs --iam")
    if flags.per_day is not None and not (flags.cost and flags.per_day >= 0):
        raise Refused("--per-day needs --cost, and a number of messages from 0")
    engine = engine_of(flags)
    plan = _plan(flags, engine)
    if flags.iam:
        return _print_policy(flags, engine, plan)
    if flags.cost:
        return _print_cost(flags, engine, plan)
    found = diagnose(gather(flags.target, plan, engine.broker))
    if flags.json:
        print(json.dumps({"domain": engine.domain, "findings": findings.as_plain(found)}, indent=2))
    else:
        print(findings.as_text(found))
    return Exit.FAILED if findings.failed(found) else Exit.DONE


def diagnose(facts: Facts) -> list[Finding]:
    """Return the findings of all checks, in their order."""
    return [finding for check in CHECKS for finding in check(facts)]


def _plan(flags: Namespace, engine: Engine) -> RunPlan:
    environ = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    options = run_options(flags, environ)
    only = task_names(options.only, engine.pipeline)
    return plan_run(engine, only, workers=worker_counts(options.workers, engine.pipeline, only))


def _print_policy(flags: Namespace, engine: Engine, plan: RunPlan) -> Exit:
    found = policy(engine.broker, uses_of(plan), create=flags.create)
    if found is None:
        raise Refused(f"{engine.broker.describe()} grants no rights by a policy. Name SQS: --broker sqs://REGION")
    print(json.dumps(found, indent=2))
    return Exit.DONE


def _print_cost(flags: Namespace, engine: Engine, plan: RunPlan) -> Exit:
    if policy(engine.broker, (), create=False) is None:
        raise Refused(f"{engine.broker.describe()} bills no requests. Name SQS: --broker sqs://REGION")
    state = running(engine.domain)
    # Requests to another queue service say nothing about this one's.
    if state is not None and state["engine"]["broker"] != engine.broker.describe():
        state = None
    found = cost.cost_of(plan, state, flags.per_day)
    print(json.dumps(cost.as_plain(found), indent=2) if flags.json else cost.as_text(found))
    return Exit.DONE
