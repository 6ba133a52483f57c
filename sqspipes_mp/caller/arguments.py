"""Types of the arguments of ``Engine``'s methods. Pure (caller)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Generic, Literal, TypeAlias, TypedDict, TypeVar

from sqspipes_mp.pipeline.task import Key, TaskRef, Workers

StartMethod: TypeAlias = Literal["fork", "forkserver", "spawn"]
Only: TypeAlias = TaskRef | Collection[TaskRef] | None
#: Positional arguments of the one task that runs here, or of each task by its name.
Args: TypeAlias = Sequence[Any] | Mapping[str, Sequence[Any]]
V = TypeVar("V")


class PlanArgs(TypedDict, total=False):
    """Keyword arguments of ``Engine.run`` that make its plan; ``run`` explains them."""

    args: Args | None
    workers: Workers | Mapping[str, Workers] | None
    priority: int | Callable[[Any], int]
    min_priority: int | None
    max_priority: int | None
    until: Literal["drained", "stopped"] | None
    idle: float | None
    wait_for_broker: float | None


class RunArgs(PlanArgs, total=False):
    """Keyword arguments of ``Engine.run`` beside ``only`` and ``iterate``; ``run`` explains them."""

    progress: bool | None
    http: str | None


class MapArgs(TypedDict, Generic[V], total=False):
    """Keyword arguments of ``Engine.map`` on which its result's type does not depend; ``map`` explains them."""

    ordered: bool
    key: Callable[[V], Key] | None
    resume: bool
    keep_results: bool
    progress: bool | None
