"""Requests to the stand-in itself, under ``/-/`` of its port: the ledger, faults, the clock, pauses."""

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

from standin.connection import Gate
from standin.queue import Queue
from standin.service import Service

Json = dict[str, Any]


class Control:
    """Answers one request at a time. Raises ``ValueError``, ``KeyError`` or ``TypeError`` for a wrong one."""

    def __init__(self, service: Service, gate: Gate) -> None:
        self._service = service
        self._gate = gate
        self._do: dict[str, Callable[[Json], Json]] = {
            "ledger": self._ledger,
            "faults": self._faults,
            "plan": self._plan,
            "reset": self._reset,
            "clock": self._clock,
            "keys": self._keys,
            "pause": self._pause,
            "resume": self._resume,
        }

    def __call__(self, _method: str, path: str, body: bytes) -> str:
        parts = urlsplit(path)
        query: Json = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        asked = {**query, **json.loads(body or b"{}")}
        return json.dumps(self._do[parts.path.removeprefix("/-/")](asked))

    def _ledger(self, asked: Json) -> Json:
        service = self._service
        names = [asked["queue"]] if "queue" in asked else list(service.queues)
        messages = str(asked.get("messages", 1)) != "0"
        return {
            "queues": {name: self._of(service.queues[name], messages) for name in names},
            "requests": {name: dataclasses.asdict(count) for name, count in service.counts.items()},
            "violations": service.violations,
            "faults": service.dice.hits,
            "planned": sum(map(len, service.dice.plans.values())),
            "waiting": sum(sum(w.open for w in queue.line.waiting) for queue in service.queues.values()),
            "held": len(self._gate.held),
            "cpu_seconds": time.process_time(),
        }

    def _of(self, queue: Queue, messages: bool) -> Json:
        queue.show_due(self._service.clock.now())
        told: Json = dataclasses.asdict(queue.tally)
        told |= {"visible": queue.visible, "in_flight": queue.in_flight, "delayed": queue.delayed}
        if messages:
            told["messages"] = [message.record() for message in (*(queue.past or ()), *queue.messages.values())]
        return told

    def _faults(self, asked: Json) -> Json:
        self._service.options.faults.change(asked)
        return dataclasses.asdict(self._service.options.faults)

    def _plan(self, asked: Json) -> Json:
        dice = self._service.dice
        dice.plan(asked["operation"], asked["fault"], int(asked.get("times", 1)), list(asked.get("entries", ())))
        return {}

    def _reset(self, asked: Json) -> Json:
        self._service.reset()
        return asked

    def _clock(self, asked: Json) -> Json:
        self._service.advance(float(asked["advance"]))
        return {"offset": self._service.clock.offset}

    def _keys(self, asked: Json) -> Json:
        service = self._service
        service.options.key = str(asked.get("key", service.options.key))
        service.expired_keys |= set(asked.get("expire", ()))
        service.expired_keys -= set(asked.get("renew", ()))
        return {"key": service.options.key, "expired": sorted(service.expired_keys)}

    def _pause(self, asked: Json) -> Json:
        self._gate.closed = True
        return asked

    def _resume(self, asked: Json) -> Json:
        self._gate.open()
        return asked
