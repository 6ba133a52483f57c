"""The end of a run: which one applies, and why. Pure (any process)."""

from __future__ import annotations

from sqspipes_mp.pipeline.plan import RunPlan, endless


def has_end(plan: RunPlan) -> bool:
    """Tell whether a run ends by itself."""
    if plan.until is None:
        return plan.counted or _sources_alone(plan)
    return plan.until == "drained"


def describe_end(plan: RunPlan) -> str:
    """Return the end of a run with the reason, for the log line of its start."""
    if plan.counted:
        return "ends with its values (map)"
    if plan.until == "drained":
        why = 'until="drained"' if plan.until_given else "all tasks run here, and the source is a generator"
        return f"ends once the queues are drained: {why}"
    if plan.until == "stopped":
        return 'goes on until it is stopped: until="stopped"'
    if _sources_alone(plan):
        return "ends with its source: no other task runs here"
    return f"goes on until it is stopped: {endless(plan)}"


def _sources_alone(plan: RunPlan) -> bool:
    return plan.source is not None and plan.source.ends and plan.selected == (0,)
