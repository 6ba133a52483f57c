"""The names of a pipeline's queues. Pure; any process.

::

    input  ->  [ first ]  ->  domain-first[--pN]  ->  [ second ]  ->  domain-second[--pN]  ->  [ last ]
                   |                                       |                                       |
           domain-first--dead                     domain-second--dead                      domain-last--dead

``input`` is ``domain--input[--pN]`` for a task that is fed, a queue of others, or nothing for a source. ``N`` is a
priority from 1; priority 0 has no suffix. Names of FIFO queues end in ``.fifo``. Output queues are sqspipes's.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqspipes_mp.pipeline.task import Task

#: Longest queue name, characters, the .fifo suffix counted (Amazon SQS API Reference, CreateQueue).
MAX_NAME = 80


@dataclass(frozen=True, slots=True)
class QueueNames:
    """Makes the names of one pipeline's queues; those of a task are in the order of the priorities, lowest first."""

    domain: str
    fifo: bool

    def inputs(self, first: Task) -> tuple[str, ...]:
        """Return the queues that the first task receives from; none for a source."""
        if first.input is True:
            return self._levels("--input", first.priorities)
        return () if first.input is None else (first.input,)

    def outputs(self, task: Task) -> tuple[str, ...]:
        """Return the queues that a task sends to."""
        return self._levels(f"-{task.name}", task.priorities)

    def dead(self, task: Task) -> str:
        """Return a task's dead-letter queue."""
        return self._name(f"-{task.name}--dead")

    def _levels(self, middle: str, priorities: int) -> tuple[str, ...]:
        return tuple(self._name(middle if level == 0 else f"{middle}--p{level}") for level in range(priorities))

    def _name(self, middle: str) -> str:
        return f"{self.domain}{middle}{'.fifo' if self.fifo else ''}"
