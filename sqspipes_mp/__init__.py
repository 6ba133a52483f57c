"""Multiprocess worker engine for CPU-bound pipeline stages over AWS SQS or one SQLite file.

``Engine(tasks).run()`` runs a pipeline of plain functions, each stage in its own worker processes, joined by durable
queues; see README.rst.
"""

from sqspipes_mp.brokers import SQS, SQLite
from sqspipes_mp.caller.dead_letters import DeadLetter
from sqspipes_mp.caller.stats import PipelineStats
from sqspipes_mp.client import TaskClient
from sqspipes_mp.engine import Engine
from sqspipes_mp.errors import (
    AccessDenied,
    BootError,
    BrokerError,
    ConfigError,
    DecodeError,
    MapIncomplete,
    MapRunning,
    MessageTooLarge,
    OutputError,
    PutError,
    QueueMissing,
    QueuesNotEmpty,
    Reject,
    RemoteError,
    RestartLimit,
    Retry,
    SqsPipesError,
    StartRefused,
    SupervisorLost,
    TaskTimeout,
    UnknownResult,
    WorkerLost,
    WrongShape,
)
from sqspipes_mp.ipc.summary import StageSummary, Summary
from sqspipes_mp.messages.envelope import envelope
from sqspipes_mp.pipeline.current import CurrentMessage, current_message
from sqspipes_mp.pipeline.task import EmptyTaskOutput, Task, TaskCallback

__version__ = "0.1.1"

__all__ = [
    "SQS",
    "AccessDenied",
    "BootError",
    "BrokerError",
    "ConfigError",
    "CurrentMessage",
    "DeadLetter",
    "DecodeError",
    "EmptyTaskOutput",
    "Engine",
    "MapIncomplete",
    "MapRunning",
    "MessageTooLarge",
    "OutputError",
    "PipelineStats",
    "PutError",
    "QueueMissing",
    "QueuesNotEmpty",
    "Reject",
    "RemoteError",
    "RestartLimit",
    "Retry",
    "SQLite",
    "SqsPipesError",
    "StageSummary",
    "StartRefused",
    "Summary",
    "SupervisorLost",
    "Task",
    "TaskCallback",
    "TaskClient",
    "TaskTimeout",
    "UnknownResult",
    "WorkerLost",
    "WrongShape",
    "__version__",
    "current_message",
    "envelope",
]
