"""Multiprocess worker engine for CPU-bound pipeline stages over AWS SQS or one SQLite file.

``Engine(tasks).run()`` runs a pipeline of plain functions, each stage in its own worker processes, joined by durable
queues; the documentation is in docs/.
"""

import sys
from importlib import import_module

if sys.platform == "win32":
    raise ImportError("sqspipes_mp runs on Linux and macOS: on Windows run your program in WSL2 or in a container")

# The name is known to type checkers; typing itself takes as long to load as a health check may.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from sqspipes_mp.brokers import SQS, SQLite
    from sqspipes_mp.brokers.base import Broker, Depth
    from sqspipes_mp.caller.dead_letters import DeadLetter
    from sqspipes_mp.caller.results import Results
    from sqspipes_mp.caller.stats import PipelineStats, QueueStats, StageStats
    from sqspipes_mp.client import TaskClient
    from sqspipes_mp.engine import Engine
    from sqspipes_mp.errors import (
        AccessDenied,
        BootError,
        BrokerBusy,
        BrokerError,
        BrokerUnreachable,
        Cancelled,
        ConfigError,
        DecodeError,
        MapIncomplete,
        MapRunning,
        MessageTooLarge,
        OrderRefused,
        OutputError,
        PutError,
        QueueMissing,
        QueuesNotEmpty,
        Reject,
        RemoteError,
        RestartLimit,
        ResultsNotKept,
        Retry,
        SqsPipesError,
        StartFailed,
        StartRefused,
        SupervisorLost,
        TaskTimeout,
        UnknownResult,
        Verdict,
        WorkerLost,
        WrongShape,
    )
    from sqspipes_mp.ipc.summary import StageSummary, Summary
    from sqspipes_mp.messages.envelope import Envelope, envelope
    from sqspipes_mp.messages.failure import Failure
    from sqspipes_mp.pipeline.current import CurrentMessage, current_message
    from sqspipes_mp.pipeline.task import (
        Continue,
        EmptyTaskOutput,
        OnError,
        Policy,
        Task,
        TaskCallback,
        TaskLike,
        Workers,
    )

__version__ = "0.1.1"

__all__ = [
    "SQS",
    "AccessDenied",
    "BootError",
    "Broker",
    "BrokerBusy",
    "BrokerError",
    "BrokerUnreachable",
    "Cancelled",
    "ConfigError",
    "Continue",
    "CurrentMessage",
    "DeadLetter",
    "DecodeError",
    "Depth",
    "EmptyTaskOutput",
    "Engine",
    "Envelope",
    "Failure",
    "MapIncomplete",
    "MapRunning",
    "MessageTooLarge",
    "OnError",
    "OrderRefused",
    "OutputError",
    "PipelineStats",
    "Policy",
    "PutError",
    "QueueMissing",
    "QueueStats",
    "QueuesNotEmpty",
    "Reject",
    "RemoteError",
    "RestartLimit",
    "Results",
    "ResultsNotKept",
    "Retry",
    "SQLite",
    "SqsPipesError",
    "StageStats",
    "StageSummary",
    "StartFailed",
    "StartRefused",
    "Summary",
    "SupervisorLost",
    "Task",
    "TaskCallback",
    "TaskClient",
    "TaskLike",
    "TaskTimeout",
    "UnknownResult",
    "Verdict",
    "WorkerLost",
    "Workers",
    "WrongShape",
    "__version__",
    "current_message",
    "envelope",
]

#: The names of each module but ``errors``, which has the others. A module is loaded at a name's first use:
#: ``sqspipes-mp health`` runs every few seconds and needs none.
_MODULES = {
    "brokers": "SQS SQLite",
    "brokers.base": "Broker Depth",
    "caller.dead_letters": "DeadLetter",
    "caller.results": "Results",
    "caller.stats": "PipelineStats QueueStats StageStats",
    "client": "TaskClient",
    "engine": "Engine",
    "ipc.summary": "StageSummary Summary",
    "messages.envelope": "Envelope envelope",
    "messages.failure": "Failure",
    "pipeline.current": "CurrentMessage current_message",
    "pipeline.task": "Continue EmptyTaskOutput OnError Policy Task TaskCallback TaskLike Workers",
}
_HOMES = dict.fromkeys(set(__all__) - {"__version__"}, "errors")
_HOMES |= {name: module for module, names in _MODULES.items() for name in names.split()}
#: Folders and modules that ``import sqspipes_mp`` alone gives access to.
_FOLDERS = frozenset(
    {"brokers", "caller", "client", "engine", "errors", "host", "ipc", "messages", "pipeline", "supervisor"}
)


def __getattr__(name: str) -> object:
    """Load a name at its first use."""
    if name in _FOLDERS:
        return import_module(f"{__name__}.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
    return found


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return list(__all__)
