"""The order of a queue's visible messages. A standard queue has one row, a FIFO queue a row for each group."""

from collections import deque
from collections.abc import Iterable
from heapq import heappop, heappush
from random import Random

from standin.message import Message, State


class StandardShelf:
    """A row that is roughly first in, first out; returned messages go to the front.

    ``shuffle``: any of this many oldest messages comes first. A message that was deleted or hidden while in the row is
    passed over at its turn.
    """

    def __init__(self, random: Random, shuffle: int) -> None:
        self._row: deque[Message] = deque()
        self._random = random
        self._shuffle = shuffle

    def sent(self, message: Message) -> None:
        """Add a message that was sent, once it is visible."""
        if message.state is State.VISIBLE:
            self.shown(message)

    def shown(self, message: Message) -> None:
        """Add a message whose delay has ended."""
        if not message.listed:
            message.listed = True
            self._row.append(message)

    def returned(self, messages: Iterable[Message]) -> None:
        """Add messages whose deliveries have ended without a delete."""
        back = [message for message in messages if not message.listed]
        for message in back:
            message.listed = True
        self._row.extendleft(reversed(back))

    def freed(self, message: Message) -> None:
        """Note that a message in flight was deleted or redriven."""

    def take_visible(self, count: int) -> list[Message]:
        """Remove and return up to ``count`` visible messages."""
        if self._shuffle and len(self._row) > 1:
            self._mix(count)
        taken: list[Message] = []
        row = self._row
        while row and len(taken) < count:
            message = row.popleft()
            message.listed = False
            if message.state is State.VISIBLE:
                taken.append(message)
        return taken

    def _mix(self, count: int) -> None:
        first = [self._row.popleft() for _ in range(min(len(self._row), count + self._shuffle))]
        self._random.shuffle(first)
        self._row.extendleft(first)


class _Group:
    __slots__ = ("busy", "name", "ready", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.waiting: list[tuple[int, Message]] = []
        self.busy = 0
        self.ready = False


class FifoShelf:
    """Rows in order, one for each group; a group with a message in flight is blocked."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}
        self._ready: deque[_Group] = deque()

    def sent(self, message: Message) -> None:
        self._put(message)
        self.shown(message)

    def shown(self, message: Message) -> None:
        self._consider(self._groups[message.group or ""])

    def returned(self, messages: Iterable[Message]) -> None:
        for message in messages:
            self._put(message)
            self.freed(message)

    def freed(self, message: Message) -> None:
        group = self._groups[message.group or ""]
        group.busy -= 1
        self._consider(group)

    def take_visible(self, count: int) -> list[Message]:
        """Remove and return up to ``count`` messages, as many of one group as possible."""
        taken: list[Message] = []
        while self._ready and len(taken) < count:
            group = self._ready.popleft()
            group.ready = False
            while group.waiting and len(taken) < count and group.waiting[0][1].state is State.VISIBLE:
                taken.append(heappop(group.waiting)[1])
                group.busy += 1
        return taken

    def _put(self, message: Message) -> None:
        name = message.group or ""
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = _Group(name)
        heappush(group.waiting, (message.number, message))

    def _consider(self, group: _Group) -> None:
        if group.busy or group.ready:
            return
        if not group.waiting:
            del self._groups[group.name]
        elif group.waiting[0][1].state is State.VISIBLE:
            group.ready = True
            self._ready.append(group)


Shelf = StandardShelf | FifoShelf
