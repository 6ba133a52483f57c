"""Multiprocess worker engine for CPU-bound pipeline stages over AWS SQS or one SQLite file.

``Engine(tasks).run()`` runs a pipeline of plain functions, each stage in its own worker processes, joined by durable
queues; see README.rst.
"""

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
    ResultsNotKept,
    Retry,
    SqsPipesError,
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
from sqspipes_mp.pipeline.task import EmptyTaskOutput, OnError, Policy, Task, TaskCallback, TaskLike, Workers

__version__ = "0.1.1"

__all__ = [
    "SQS",
    "AccessDenied",
    "BootError",
    "Broker",
    "BrokerBusy",
    "BrokerError",
    "ConfigError",
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
