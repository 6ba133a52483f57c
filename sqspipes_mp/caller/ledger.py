"""The ledger of ``map``: the messages of each fed value, until none is left. Pure (caller).

::

    worker   a generator's first outputs were accepted:             (token, None, children)           it goes on
    worker   before a message's outputs are accepted:               (token, hop, children, delivery)  it is done
    worker   before the message is dead-lettered; keeper as well:   (token, hop), the error           it is done
    caller   a value is done once each of its messages is

``token`` names the value (its first message's hop id); ``hop`` and ``children`` name messages, by 64 bits of their hop
ids. A worker reports a step before it takes it, so no death of a worker leaves a step unreported. A step that was
reported and not taken comes again, with its message, and is reported again: hence the ledger keeps sets and no sums.
The second call may end otherwise, so the report of the last ``delivery`` counts: children that only an earlier one has
announced are not awaited. On SQS some may have been accepted all the same; their results open the value again.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from sqspipes_mp.caller.kept import Kept
from sqspipes_mp.ipc.channel import Frame
from sqspipes_mp.messages.ids import mark

#: Most ended values remembered, to refuse a key that was used before.
_REMEMBERED = 100_000
#: Most ended values remembered whose results may follow: each with its value.
_FOLLOWED = 1_000
#: Least number of handed-out results remembered: a result comes again if its worker dies before the delete.
_HANDED = 100_000


@dataclass(slots=True, eq=False)
class Entry:
    """A value on its way."""

    token: str
    value: Any = None
    #: Whether the caller's iterable has come to the value (after a resume: not yet).
    known: bool = True
    #: The value's messages.
    made: set[int] = field(default_factory=set)
    #: Those of them that are done.
    done: set[int] = field(default_factory=set)
    #: Those of them that are not awaited: announced by a report that does not count, or perhaps never made.
    unmade: set[int] = field(default_factory=set)
    #: The children of each message that is done, and the delivery that has announced them.
    announced: dict[int, tuple[int, frozenset[int]]] = field(default_factory=dict)
    #: Messages that have given all their results.
    gave: set[int] = field(default_factory=set)
    #: Results that wait, by their ids.
    held: OrderedDict[str, Frame] = field(default_factory=OrderedDict)
    #: Earlier frames of results that wait, by the results' ids: copies, or a dead worker's.
    copies: dict[str, list[Frame]] = field(default_factory=dict)
    #: Results of earlier runs that are still to be handed out; None: there are none.
    kept: Kept | None = None
    #: Ids of the results that were handed out.
    handed: set[str] = field(default_factory=set)
    #: The first error of its messages.
    error: BaseException | None = None
    #: Number of results that are not acknowledged, and of errors that were not raised.
    waiting: int = 0
    #: Whether the value stands in the line, in which results keep the order of the values.
    lined: bool = False
    #: Results may come after the value's end: a message was dead-lettered, or a child is not awaited.
    may_follow: bool = False

    @property
    def finished(self) -> bool:
        """Tell whether each awaited message of the value is done."""
        return len(self.made) <= len(self.done) + len(self.unmade) and self.made <= self.done | self.unmade

    def announce(self, hop: int, children: Iterable[int], delivery: int) -> bool:
        """Note a message's children; False: the report of a later delivery counts."""
        now = frozenset(children)
        before, earlier = self.announced.get(hop, (0, frozenset()))
        if before > delivery:
            return False
        self.announced[hop] = (delivery, now)
        self.made |= now
        self.unmade -= now
        self.give_up(earlier - now)
        return True

    def give_up(self, children: Iterable[int]) -> None:
        """Await children no more that are not done."""
        lacking = self.made.intersection(children) - self.done
        self.unmade |= lacking
        self.may_follow |= bool(lacking)


@dataclass(frozen=True, slots=True)
class Hand:
    """One thing to give to the caller: a result of a value, the value's error, or the next of its kept results."""

    entry: Entry
    #: The result; None for an error and for kept results.
    frame: Frame | None
    error: BaseException | None = None
    #: Earlier frames of the result, to be acknowledged with it.
    copies: tuple[Frame, ...] = ()

    @property
    def frames(self) -> tuple[Frame, ...]:
        """The frames that are acknowledged once the caller is done with it."""
        return self.copies if self.frame is None else (*self.copies, self.frame)

    @property
    def kept(self) -> Kept | None:
        """The value's kept results; None for a result of this run, and for an error."""
        return self.entry.kept if self.frame is None and self.error is None else None


class Ledger:
    """All values on their way, and the order in which their results go to the caller.

    Args:
        ordered: in the order of the values; else as the results come.
        inputs: a result waits until its value is known.
    """

    def __init__(self, *, ordered: bool, inputs: bool) -> None:
        self._ordered = ordered
        self._inputs = inputs or ordered
        self._open: dict[str, Entry] = {}
        self._line: deque[Entry] = deque()
        self._ready: deque[Hand] = deque()
        self._gone: OrderedDict[str, None] = OrderedDict()
        #: Those of the ended values whose results may follow.
        self._followed: OrderedDict[str, Entry] = OrderedDict()
        #: Handed-out results of ended values, by hashes of their ids: the younger half, and the older half.
        self._handed: set[int] = set()
        self._handed_before: set[int] = set()
        #: Messages found in dead-letter queues, by their values. Their errors are given when the iterable comes there.
        self._dead: dict[str, list[tuple[int, BaseException]]] = {}
        #: Number of results held back until their value is known.
        self.holding = 0
        #: Number of messages whose results were not acknowledged.
        self.unacknowledged = 0

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, name: str) -> bool:
        """Tell whether a value is on its way, or is one of the ended values remembered."""
        return name in self._open or name in self._gone

    @property
    def dead_values(self) -> int:
        """Number of values with dead letters that the iterable has not come to."""
        return len(self._dead)

    @property
    def lined(self) -> bool:
        """Whether the line, in which results keep the order of the values, has any value."""
        return bool(self._line)

    # -- values -------------------------------------------------------------------------------------------------

    def fed(self, name: str, value: Any, hop: str | None = None) -> None:
        """Note a value that was sent, as the message ``hop``; None: its hop id is ``name``."""
        self._line_up(self._opened(name, value, {mark(name if hop is None else hop)}))

    def left(self, name: str, hops: Iterable[str]) -> None:
        """Note messages of a value found in the queues; the iterable may come to the value later."""
        entry = self._open.get(name) or self._opened(name, None, set(), known=False)
        entry.made.update(map(mark, hops))

    def dead(self, name: str, hop: str, error: BaseException) -> None:
        """Note a dead letter of a value; its error is given if the iterable comes to the value."""
        self._dead.setdefault(name, []).append((mark(hop), error))

    def met(self, name: str, value: Any, kept: Kept | None = None) -> bool:
        """Note that the iterable came to a value sent before. False: the value is done, or was met already.

        ``kept``: results of earlier runs that are to be handed out before those of this one.
        """
        letters = self._dead.pop(name, [])
        entry = self._open.get(name)
        if (letters or kept is not None) and entry is None:
            entry = self._opened(name, value, set(), known=False)
        if entry is None or entry.known:
            return False
        if kept is not None:
            entry.kept = kept
            entry.waiting += 1
            if not self._ordered:
                self._ready.append(Hand(entry, None))
        for hop, error in letters:
            self.dead_lettered(name, hop, error)
        self._make_known(entry, value)
        return True

    def refused(self, name: str, value: Any, error: BaseException) -> None:
        """Note a value that cannot be sent."""
        entry = self._opened(name, value, set())
        self._line_up(entry)
        self._fail(entry, error)

    def exhausted(self) -> None:
        """Note the iterable's end: results of values that it never came to are given out last."""
        for entry in [entry for entry in self._open.values() if not entry.known]:
            self._make_known(entry, None)

    # -- reports of the workers ---------------------------------------------------------------------------------

    def step(self, name: str, hop: int | None, children: Iterable[int], delivery: int = 0) -> None:
        """Note a message's outputs' hops, and that it is done; ``hop`` None: its generator goes on.

        ``delivery``: the number of the message's receives.
        """
        entry = self._open.get(name)
        if entry is None:
            return
        if hop is None:
            entry.made.update(children)
        elif entry.announce(hop, children, delivery):
            entry.made.add(hop)
            entry.done.add(hop)
            self._close_if_over(entry)

    def result(self, frame: Frame) -> bool | None:
        """Take a result.

        Returns True for a result of a value on its way. False: the result was handed out, and comes again after its
        value's end. None: an unknown result, which can only be given back. That its value was ours is not enough: a
        message that a person redrives has new results, and so has a function that makes more outputs the second time.
        """
        name, ident = str(frame.header["token"]), str(frame.header["id"])
        entry = self._open.get(name)
        if entry is None:
            if hash(ident) in self._handed or hash(ident) in self._handed_before:
                return False
            entry = self._open_again(name)
            if entry is None:
                return None
        earlier = entry.held.get(ident)
        if earlier is not None:
            # The worker of the first one is gone, or has a copy of the message: whoever lives must be acknowledged.
            entry.copies.setdefault(ident, []).append(earlier)
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
            entry.gave.add(frame.header["hop"])
            self.step(name, frame.header["hop"], frame.header.get("children", ()), frame.header.get("delivery", 0))
        return True

    def dead_lettered(self, name: str, hop: int, error: BaseException) -> None:
        """Note that a message was dead-lettered, and its error, unless all its results have come before."""
        entry = self._open.get(name)
        if entry is None:
            return
        entry.done.add(hop)
        entry.made.add(hop)
        entry.give_up(entry.announced.get(hop, (0, ()))[1])
        # A generator may have sent outputs before that nobody has reported.
        entry.may_follow = True
        if hop in entry.gave:
            self._close_if_over(entry)
        else:
            self._fail(entry, error)

    # -- the caller ---------------------------------------------------------------------------------------------

    def waiting_on(self) -> set[int]:
        """Return the numbers of the workers whose results wait for an earlier value's."""
        return {
            frame.header["child"]
            for entry in self._line
            for frame in chain(entry.held.values(), *entry.copies.values())
        }

    def next(self) -> Hand | None:
        """Return the next result or error for the caller; None while it has not come yet."""
        while self._ordered and not self._ready and self._line:
            first = self._line[0]
            if first.kept is not None:
                self._ready.append(Hand(first, None))
            elif first.held:
                ident, frame = first.held.popitem(last=False)
                self._ready.append(_hand(first, ident, frame))
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
        """Tell whether the caller has not had it before."""
        return hand.frame is None or str(hand.frame.header["id"]) not in hand.entry.handed

    def given(self, hand: Hand) -> None:
        """Note that the result goes to the caller."""
        if hand.frame is not None:
            hand.entry.handed.add(str(hand.frame.header["id"]))

    def back(self, hand: Hand) -> None:
        """Take back a result that could not be given; it is the next one again."""
        self._ready.appendleft(hand)

    def kept_over(self, entry: Entry) -> None:
        """Note that all kept results of a value were handed out."""
        entry.kept = None
        entry.waiting -= 1
        self._close_if_over(entry)

    def acknowledged(self, hand: Hand) -> None:
        """Note that the caller has asked for another result."""
        hand.entry.waiting -= 1
        if hand.frame is not None:
            self.unacknowledged -= bool(hand.frame.header["last"])
        self._close_if_over(hand.entry)

    # -----------------------------------------------------------------------------------------------------------

    def _opened(self, name: str, value: Any, made: set[int], *, known: bool = True) -> Entry:
        entry = self._open[name] = Entry(name, value, known, made)
        return entry

    def _open_again(self, name: str) -> Entry | None:
        """Open a value whose results may follow its end; its error was handed out. None: it is none of these."""
        gone = self._followed.pop(name, None)
        if gone is None:
            return None
        self._gone.pop(name, None)
        entry = self._opened(name, gone.value, set(), known=gone.known)
        entry.handed, entry.may_follow = gone.handed, True
        self._line_up(entry)
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
            self._ready += [_hand(entry, ident, frame) for ident, frame in entry.held.items()]
            entry.held.clear()
            # Without inputs the error did not wait for the value.
            if entry.error is not None and self._inputs:
                self._ready.append(Hand(entry, None, entry.error))
        self._close_if_over(entry)

    def _fail(self, entry: Entry, error: BaseException) -> None:
        """Note a value's error; the caller sees the first one."""
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
        if not entry.made:
            # No message of this run was the value's.
            return
        self._gone[entry.token] = None
        if entry.may_follow:
            self._followed[entry.token] = entry
            if len(self._followed) > _FOLLOWED:
                self._followed.popitem(last=False)
        if len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)
        self._handed.update(map(hash, entry.handed))
        if len(self._handed) >= _HANDED:
            self._handed_before, self._handed = self._handed, set()


def _hand(entry: Entry, ident: str, frame: Frame) -> Hand:
    return Hand(entry, frame, copies=tuple(entry.copies.pop(ident, ())))
