"""What ``map`` counts: the messages that come of each fed value, until none is left. Pure.

::

    worker   before a message's outputs are accepted:  (token, hop, children)   "this one becomes those"
    worker   before it is dead-lettered; so the keeper: (token, hop), the error  "this one became nothing"
    caller   the value is done once everything that was made of it became something

``token`` names the value (its first message's hop id), ``hop`` and ``children`` messages, by 64 bits of their hop ids.
Each is said before it is made true, so that no death of a worker can leave it unsaid; if it is then not made true, the
message comes again and says the same again. That is why sets are kept and not sums, and why the order does not matter.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sqspipes_mp.ipc.channel import Frame
from sqspipes_mp.messages.ids import mark

#: Values remembered after their end, to tell a key that was used before.
_REMEMBERED = 100_000
#: Results remembered that were handed out, at least: they come again if their worker died before the delete.
_HANDED = 100_000


@dataclass(slots=True, eq=False)
class Entry:
    """A value on its way. ``known``: the caller's iterable has come to it (not yet after a resume)."""

    token: str
    value: Any = None
    known: bool = True
    made: set[int] = field(default_factory=set)
    done: set[int] = field(default_factory=set)
    #: Results that wait, by their ids.
    held: OrderedDict[str, Frame] = field(default_factory=OrderedDict)
    handed: set[str] = field(default_factory=set)
    error: BaseException | None = None
    #: Results that came and were not acknowledged, and errors that were not told.
    waiting: int = 0
    #: Whether it stands in the line, where results keep the order of the values.
    lined: bool = False

    @property
    def finished(self) -> bool:
        """Whether everything that was made of it became something."""
        return self.made <= self.done


@dataclass(frozen=True, slots=True)
class Hand:
    """What to give to the caller: a result (``frame``) or an error of a value; neither: nothing, ``frame`` is known."""

    entry: Entry
    frame: Frame | None
    error: BaseException | None = None


class Ledger:
    """All values on their way, and in which order their results go to the caller.

    ``ordered``: in the order of the values; else as they come. ``inputs``: a result waits until its value is known.
    """

    def __init__(self, *, ordered: bool, inputs: bool) -> None:
        self._ordered = ordered
        self._inputs = inputs or ordered
        self._open: dict[str, Entry] = {}
        self._line: deque[Entry] = deque()
        self._ready: deque[Hand] = deque()
        self._gone: OrderedDict[str, None] = OrderedDict()
        #: Results of ended values that were handed out, by hashes of their ids: the younger half, and the older one.
        self._handed: set[int] = set()
        self._handed_before: set[int] = set()
        #: Messages found in dead-letter queues, by their values; told when the iterable comes to these.
        self._dead: dict[str, list[tuple[int, BaseException]]] = {}
        #: Results held back until their value is known.
        self.holding = 0
        #: Messages whose results were not acknowledged.
        self.unacknowledged = 0

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, name: str) -> bool:
        """Tell whether a value is on its way or was, as far back as is remembered."""
        return name in self._open or name in self._gone

    @property
    def lined(self) -> bool:
        """Whether the line, in which results keep the order of the values, has any value."""
        return bool(self._line)

    # -- values -------------------------------------------------------------------------------------------------

    def fed(self, name: str, value: Any, hop: str | None = None) -> None:
        """A value was sent, as the message ``hop``; None: ``name`` is its hop id, too."""
        self._line_up(self._opened(name, value, {mark(name if hop is None else hop)}))

    def left(self, name: str, hops: Iterable[str]) -> None:
        """Messages of a value were found in the queues; the iterable may come to it later."""
        entry = self._open.get(name) or self._opened(name, None, set(), known=False)
        entry.made.update(map(mark, hops))

    def dead(self, name: str, hop: str, error: BaseException) -> None:
        """A message of a value was found in a dead-letter queue; nobody is told unless the iterable comes to it."""
        self._dead.setdefault(name, []).append((mark(hop), error))

    def met(self, name: str, value: Any) -> bool:
        """The iterable came to a value that was sent before; False: it is done, or was met already."""
        letters = self._dead.pop(name, [])
        entry = self._open.get(name)
        if letters and entry is None:
            entry = self._opened(name, value, set(), known=False)
        if entry is None or entry.known:
            return False
        for hop, error in letters:
            self.buried(name, hop, error)
        self._make_known(entry, value)
        return True

    def refused(self, name: str, value: Any, error: BaseException) -> None:
        """A value could not be sent."""
        entry = self._opened(name, value, set())
        self._line_up(entry)
        self._fail(entry, error)

    def exhausted(self) -> None:
        """The iterable ended: what it never came to is given out all the same, last."""
        for entry in [entry for entry in self._open.values() if not entry.known]:
            self._make_known(entry, None)

    # -- what the workers say -----------------------------------------------------------------------------------

    def step(self, name: str, hop: int, children: Iterable[int]) -> None:
        """A message became others, or nothing more."""
        entry = self._open.get(name)
        if entry is not None:
            entry.made.update(children)
            entry.made.add(hop)
            entry.done.add(hop)
            self._close_if_over(entry)

    def result(self, frame: Frame) -> bool | None:
        """Take a result. False: it was handed out, and comes again after its value's end.

        None: it was not, and is of no value on its way: only to be given back. That the value was ours does not do:
        what a person redrives, or a function that makes more of a value the second time, is news.
        """
        name, ident = str(frame.header["token"]), str(frame.header["id"])
        entry = self._open.get(name)
        if entry is None:
            return False if hash(ident) in self._handed or hash(ident) in self._handed_before else None
        earlier = entry.held.get(ident)
        if earlier is not None:
            # Its worker is gone, and with it whoever could be told that the first one was taken.
            entry.held[ident] = frame
            self.unacknowledged += bool(frame.header["last"]) - bool(earlier.header["last"])
        else:
            entry.waiting += 1
            self.unacknowledged += bool(frame.header["last"])
            if self._ordered or (self._inputs and not entry.known):
                entry.held[ident] = frame
                self.holding += not entry.known
            else:
                self._ready.append(Hand(entry, frame))
        if frame.header["last"]:
            self.step(name, frame.header["hop"], ())
        return True

    def buried(self, name: str, hop: int, error: BaseException) -> None:
        """A message was dead-lettered."""
        entry = self._open.get(name)
        if entry is not None:
            entry.done.add(hop)
            entry.made.add(hop)
            self._fail(entry, error)

    # -- the caller ---------------------------------------------------------------------------------------------

    def waiting_on(self) -> set[int]:
        """Return whose results wait for an earlier value's: the workers' numbers."""
        return {frame.header["child"] for entry in self._line for frame in entry.held.values()}

    def next(self) -> Hand | None:
        """Return what is to be given out next; None while it has not come yet."""
        while self._ordered and not self._ready and self._line:
            first = self._line[0]
            if first.held:
                self._ready.append(Hand(first, first.held.popitem(last=False)[1]))
            elif first.finished:
                self._line.popleft()
                first.lined = False
                if first.error is not None:
                    self._ready.append(Hand(first, None, first.error))
                else:
                    self._close_if_over(first)
            else:
                return None
        return self._ready.popleft() if self._ready else None

    def is_new(self, hand: Hand) -> bool:
        """Tell whether the caller did not have it before."""
        return hand.frame is None or str(hand.frame.header["id"]) not in hand.entry.handed

    def given(self, hand: Hand) -> None:
        """Note that it goes to the caller."""
        if hand.frame is not None:
            hand.entry.handed.add(str(hand.frame.header["id"]))

    def back(self, hand: Hand) -> None:
        """Take back what could not be given just now; it is the next one again."""
        self._ready.appendleft(hand)

    def acknowledged(self, hand: Hand) -> None:
        """Note that the caller is done with what it was given."""
        hand.entry.waiting -= 1
        if hand.frame is not None:
            self.unacknowledged -= bool(hand.frame.header["last"])
        self._close_if_over(hand.entry)

    # -----------------------------------------------------------------------------------------------------------

    def _opened(self, name: str, value: Any, made: set[int], *, known: bool = True) -> Entry:
        entry = self._open[name] = Entry(name, value, known, made)
        return entry

    def _line_up(self, entry: Entry) -> None:
        if self._ordered:
            self._line.append(entry)
            entry.lined = True

    def _make_known(self, entry: Entry, value: Any) -> None:
        entry.known, entry.value = True, value
        self._line_up(entry)
        self.holding -= len(entry.held)
        if not self._ordered:
            self._ready += [Hand(entry, frame) for frame in entry.held.values()]
            entry.held.clear()
            # Without inputs it did not wait for the value.
            if entry.error is not None and self._inputs:
                self._ready.append(Hand(entry, None, entry.error))
        self._close_if_over(entry)

    def _fail(self, entry: Entry, error: BaseException) -> None:
        """Note a value's error; the first one is what the caller sees."""
        if entry.error is None:
            entry.error = error
            entry.waiting += 1
            if not self._ordered and (entry.known or not self._inputs):
                self._ready.append(Hand(entry, None, error))
        self._close_if_over(entry)

    def _close_if_over(self, entry: Entry) -> None:
        if not entry.finished or entry.waiting or entry.lined:
            return
        self._open.pop(entry.token, None)
        self._gone[entry.token] = None
        if len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)
        self._handed.update(map(hash, entry.handed))
        if len(self._handed) >= _HANDED:
            self._handed_before, self._handed = self._handed, set()
