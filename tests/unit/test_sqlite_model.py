"""The SQLite broker against SQS's rules, written down as plain Python: two processes' connections, any order of calls.

The model says what may happen: where SQS leaves open which messages a receive brings, whatever the broker brought is
checked to be allowed and taken over. Time stands still but for the steps that let it pass.

Longer: ``SQLITE_EXAMPLES=5000 pytest tests/unit/test_sqlite_model.py``.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sqspipes_mp.brokers.base import Completion, DeadLetter, Depth, Handle, Output, Received
from sqspipes_mp.brokers.sqlite import queues as sqlite_queues
from sqspipes_mp.brokers.sqlite import session as sqlite_session
from sqspipes_mp.brokers.sqlite.connection import SQLiteConnection
from tests.unit.sqlite_bench import SPECS, opened

EXAMPLES = int(os.environ.get("SQLITE_EXAMPLES", "100"))
#: Milliseconds, as all times of the model.
SECOND, DAY = 1000, 86_400_000
WINDOW, RETENTION = 300 * SECOND, 14 * DAY
QUEUES = tuple(spec.name for spec in SPECS)
LIVE = ("in", "in.fifo", "out", "out.fifo")
queues = st.sampled_from(QUEUES)
hops = st.sampled_from([f"h{n}" for n in range(6)])
groups = st.sampled_from(["a", "b"])
seconds = st.sampled_from([0.0, 1.0, 10.0, 60.0])


@dataclass
class Message:
    """``number``: the order in which messages were accepted; ``due_first``: when its retention begins."""

    queue: str
    number: int
    body: str
    group: str | None
    visible_at: int
    due_first: int
    receives: int = 0
    charges: int = 0
    #: Number of the message whose stream this is; None: none.
    stream: int | None = None
    failure: str | None = None
    ident: str | None = None


@dataclass
class Key:
    """A hop id that was accepted: until ``expires``, or while its input ``stream`` lives and then for WINDOW."""

    expires: int | None
    stream: int | None


class Model:
    def __init__(self) -> None:
        self.now = 0
        self.count = 0
        self.messages: list[Message] = []
        self.keys: dict[tuple[str, str], Key] = {}
        #: When the memory of a stream's outputs ends; None while its input is there.
        self.streams: dict[int, int | None] = {}
        self.by_handle: dict[Handle, tuple[Message, int]] = {}

    def of(self, queue: str) -> list[Message]:
        return [message for message in self.messages if message.queue == queue]

    def current(self, handle: Handle) -> Message | None:
        found = self.by_handle.get(handle)
        if found is None or found[0] not in self.messages or found[0].receives != found[1]:
            return None
        # On FIFO queues a receipt ends with its visibility.
        ended = found[0].queue.endswith(".fifo") and found[0].visible_at < self.now
        return None if ended else found[0]

    def put(self, queue: str, body: str, group: str | None, delay: float = 0.0) -> Message:
        self.count += 1
        due = self.now + int(delay * SECOND)
        message = Message(queue, self.count, body, group, due, due)
        self.messages.append(message)
        return message

    def is_new(self, queue: str, hop: str, key: Key) -> bool:
        known = self.keys.get((queue, hop))
        if known is not None:
            ends = known.expires if known.stream is None else self.streams[known.stream]
            if ends is None or ends > self.now:
                return False
        self.keys[queue, hop] = key
        return True

    def send(self, output: Output, source: Message | None, again: bool) -> Message | None:
        fifo = output.queue.endswith(".fifo")
        key = None
        if source is None:
            key = Key(self.now + (RETENTION if again else WINDOW), None)
        elif source.stream is not None:
            key = Key(None, source.stream)
        elif fifo:
            key = Key(self.now + WINDOW, None)
        if key is None or self.is_new(output.queue, output.hop, key):
            return self.put(output.queue, output.body, output.group or output.hop if fifo else None, output.delay)
        return None

    def remove(self, message: Message, *, goes_on: bool = False) -> None:
        self.messages.remove(message)
        if message.stream is not None and not goes_on:
            self.streams[message.stream] = self.now + WINDOW

    def complete(self, completions: list[Completion]) -> list[Handle]:
        stale: list[Handle] = []
        done: dict[int, tuple[Message, bool]] = {}
        held_up = set()
        for completion in completions:
            source = None
            if completion.input is not None:
                source = self.current(completion.input)
                if source is None and completion.input in self.by_handle:
                    lost, _ = self.by_handle[completion.input]
                    if lost in self.messages and lost.group is not None:
                        held_up.add((lost.queue, lost.group))
                if source is None or source.number in done or (source.queue, source.group) in held_up:
                    stale.append(completion.input)
                    continue
                if not completion.last and source.stream is None:
                    source.stream = source.number
                    self.streams[source.number] = None
            sent = None
            for output in completion.outputs:
                sent = self.send(output, source, completion.again)
            if source is not None and completion.last:
                # A last output to the input's own queue takes the input's place, and its stream.
                goes_on = sent is not None and sent.queue == source.queue
                if goes_on and sent is not None:
                    sent.stream = source.stream
                done[source.number] = source, goes_on
        for message, goes_on in done.values():
            self.remove(message, goes_on=goes_on)
        return list(dict.fromkeys(stale))

    def ready(self, queue: str) -> dict[str | None, list[Message]]:
        """Return what may be received now: by group in its order, each group as one (standard: None)."""
        if not queue.endswith(".fifo"):
            return {None: [message for message in self.of(queue) if message.visible_at <= self.now]}
        found: dict[str | None, list[Message]] = {}
        for group in {message.group for message in self.of(queue)}:
            members = [message for message in self.of(queue) if message.group == group]
            if any(message.receives and message.visible_at > self.now for message in members):
                continue
            hidden = next((n for n, message in enumerate(members) if message.visible_at > self.now), len(members))
            if hidden:
                found[group] = members[:hidden]
        return found

    def depth(self, queue: str) -> Depth:
        hidden = [message for message in self.of(queue) if message.visible_at > self.now]
        in_flight = sum(message.receives > 0 for message in hidden)
        return Depth(len(self.of(queue)) - len(hidden), in_flight, len(hidden) - in_flight)


@contextmanager
def template() -> Iterator[Path]:
    """A file with all queues, to be copied: creating one costs more than all the rest."""
    with tempfile.TemporaryDirectory(prefix="model-") as folder:
        path = Path(folder) / "template.db"
        with opened(path):
            pass
        yield path


class SQLiteMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.model = Model()
        self.clock = patch.object(sqlite_session, "_ticks", lambda boot: 1_000_000 + self.model.now)
        self.clock.start()
        self.folder = tempfile.mkdtemp(prefix="model-")
        self.file = str(Path(self.folder) / "queues.db")
        shutil.copy(TEMPLATE[0], self.file)
        self.connections = [SQLiteConnection(self.file, durable=False) for _ in range(2)]
        for connection in self.connections:
            connection._tidy_at = math.inf
        self.handles: list[Handle] = []

    def teardown(self) -> None:
        if not hasattr(self, "connections"):
            return
        try:
            self.everything_comes_out()
        finally:
            for connection in self.connections:
                connection.close()
            shutil.rmtree(self.folder)
            self.clock.stop()

    def everything_comes_out(self) -> None:
        """In the end all that the model has can be received, FIFO groups in their order."""
        self.model.now += DAY
        connection = self.connections[0]
        for queue in QUEUES:
            got: list[Received] = []
            while batch := connection.receive([queue], 10, 0, 60):
                got += batch
                connection.complete([Completion(each.handle) for each in batch])
            expected = self.model.of(queue)
            assert sorted((each.body, each.charges, each.receives) for each in got) == sorted(
                (message.body, message.charges, message.receives + 1) for message in expected
            )
            for group in {message.group for message in expected}:
                mine = [each.body for each in got if each.group == group]
                if group is not None:
                    assert mine == [message.body for message in expected if message.group == group]

    # -- steps --------------------------------------------------------------------------------------------------

    @rule(
        which=st.integers(0, 1),
        queue=queues,
        hop=hops,
        group=groups,
        delay=seconds,
        body=st.text(max_size=3),
        again=st.booleans(),
    )
    def send(self, which: int, queue: str, hop: str, group: str, delay: float, body: str, again: bool) -> None:
        output = Output(queue, text_of(body), hop, group if queue.endswith(".fifo") else None, delay)
        assert self.connections[which].complete([Completion(None, (output,), again=again)]) == []
        self.model.complete([Completion(None, (output,), again=again)])

    @rule(which=st.integers(0, 1), queue=queues, count=st.integers(1, 8), group=groups)
    def send_many(self, which: int, queue: str, count: int, group: str) -> None:
        fifo = queue.endswith(".fifo")
        outputs = [
            Output(queue, f"{self.model.count}/{n}", f"s{self.model.count}/{n}", group if fifo else None)
            for n in range(count)
        ]
        completions = [Completion(None, (output,)) for output in outputs]
        assert self.connections[which].complete(completions) == []
        self.model.complete(completions)

    @rule(
        which=st.integers(0, 1),
        names=st.lists(queues, min_size=1, max_size=3, unique=True),
        most=st.integers(1, 10),
        visibility=seconds,
    )
    def receive(self, which: int, names: list[str], most: int, visibility: float) -> None:
        received = self.connections[which].receive(names, most, 0, visibility)
        model = self.model
        left = most
        rest = list(received)
        for name in names:
            ready = model.ready(name)
            count = min(left, sum(len(messages) for messages in ready.values()))
            mine, rest = rest[:count], rest[count:]
            left -= count
            taken = []
            for each in mine:
                assert each.handle.queue == name
                message = self.identify(each.handle, ready.get(each.group, []), each.body)
                assert message not in taken
                taken.append(message)
                message.receives += 1
                assert (each.receives, each.charges) == (message.receives, message.charges)
                assert (each.group, each.failure) == (message.group, message.failure)
                message.visible_at = model.now + int(visibility * SECOND)
                message.ident = each.handle.message_id
                assert each.handle not in model.by_handle
                model.by_handle[each.handle] = (message, message.receives)
                self.handles.append(each.handle)
            for group, messages in ready.items():
                if group is not None:
                    mine_of = [message for message in taken if message.group == group]
                    assert mine_of == messages[: len(mine_of)], "out of order within a group"
        assert rest == [], "more than was there"

    def identify(self, handle: Handle, among: list[Message], body: str) -> Message:
        """Return the model's message: by its id if it was received before, else the first such body."""
        known = [message for message in among if message.ident == handle.message_id]
        fresh = [message for message in among if message.ident is None and message.body == body]
        found = known or fresh
        assert found, "received what was not there"
        assert found[0].body == body
        if not known:
            assert all(message.ident != handle.message_id for message in self.model.messages)
        return found[0]

    def pick(self, data: st.DataObject, most: int = 4) -> list[Handle]:
        """Draw handles: mostly current ones, but stale ones, too."""
        current = [handle for handle in self.handles if self.model.current(handle) is not None]
        if not self.handles:
            return []
        stale = st.sampled_from(self.handles[-10:])
        among = st.sampled_from(current) | st.sampled_from(current) | stale if current else stale
        return data.draw(st.lists(among, min_size=1, max_size=most, unique=True))

    @rule(
        which=st.integers(0, 1),
        queue=st.sampled_from(["in", "in.fifo"]),
        members=st.lists(groups, min_size=1, max_size=5),
        delayed=st.none() | st.integers(0, 4),
        most=st.integers(1, 6),
        visibility=seconds,
    )
    def feed(
        self, which: int, queue: str, members: list[str], delayed: int | None, most: int, visibility: float
    ) -> None:
        """Messages of one or two groups, one of them delayed perhaps, and a receive."""
        completions = []
        for place, group in enumerate(members):
            name = f"f{self.model.count}/{place}"
            delay = 2.0 if place == delayed else 0.0
            output = Output(queue, name, name, group if queue == "in.fifo" else None, delay)
            completions.append(Completion(None, (output,)))
        assert self.connections[which].complete(completions) == []
        self.model.complete(completions)
        self.receive(1 - which, [queue], most, visibility)

    @rule(which=st.integers(0, 1), data=st.data(), queue=st.sampled_from(LIVE), hop=hops, last=st.booleans())
    def stream(self, which: int, data: st.DataObject, queue: str, hop: str, last: bool) -> None:
        """One of several outputs of one input."""
        handles = self.pick(data, 1)
        completions = [Completion(handle, (self.output(queue, hop, "a", 0.0),), last=last) for handle in handles]
        assert self.connections[which].complete(completions) == self.model.complete(completions)

    @rule(
        which=st.integers(0, 1),
        data=st.data(),
        queue=st.sampled_from(["out", "out.fifo"]),
        hop=hops,
        end=st.sampled_from(["stays", "completed", "purged"]),
        wait=st.integers(-1, 1),
    )
    def repeat(self, which: int, data: st.DataObject, queue: str, hop: str, end: str, wait: int) -> None:
        """One of several outputs; its input ends, or not; and the same output about when memories end."""
        connection, output = self.connections[which], self.output(queue, hop, "a", 0.0)
        for handle in self.pick(data, 1):
            begin, over = [Completion(handle, (output,), last=False)], [Completion(handle)]
            assert connection.complete(begin) == self.model.complete(begin)
            if end == "completed":
                assert connection.complete(over) == self.model.complete(over)
            elif end == "purged":
                self.purge(1 - which, [handle.queue], 0)
        self.time_passes(WINDOW + wait)
        for handle in self.pick(data, 1):
            again = [Completion(handle, (output,), last=False)]
            assert connection.complete(again) == self.model.complete(again)

    @rule(which=st.integers(0, 1), count=st.integers(2, 4), place=st.integers(0, 3), early=st.booleans())
    def uneven(self, which: int, count: int, place: int, early: bool) -> None:
        """Messages of one group come back at different times: none of it before the last of them."""
        self.feed(which, "in.fifo", ["a"] * count, None, 4, 1.0)
        mine = [handle for handle in self.handles[-count:] if self.model.current(handle) is not None]
        if place < len(mine):
            assert self.connections[which].extend(mine[place : place + 1], 10.0) == []
            message = self.model.current(mine[place])
            assert message is not None
            message.visible_at = self.model.now + 10 * SECOND
        self.time_passes(1_000 if early else 10_000)
        self.receive(which, ["in.fifo"], 10, 1.0)

    @rule(which=st.integers(0, 1), data=st.data(), time=seconds, attempts=st.integers(0, 3))
    def extend(self, which: int, data: st.DataObject, time: float, attempts: int) -> None:
        handles = self.pick(data)
        stale = self.connections[which].extend(handles, time, attempts=attempts)
        current = {handle: self.model.current(handle) for handle in handles}
        assert stale == [handle for handle in handles if current[handle] is None]
        for message in filter(None, current.values()):
            message.visible_at = self.model.now + int(time * SECOND)
            message.charges = max(message.charges, attempts)

    @rule(which=st.integers(0, 1), data=st.data())
    def complete(self, which: int, data: st.DataObject) -> None:
        outputs = st.builds(self.output, queue=st.sampled_from(LIVE), hop=hops, group=groups, delay=seconds)
        completions = [
            Completion(handle, tuple(data.draw(st.lists(outputs, max_size=3))), last=data.draw(st.booleans()))
            for handle in self.pick(data)
        ]
        more: bool = bool(completions) and data.draw(st.booleans())
        if more:
            # The rest of a stream, in the same call.
            completions.append(Completion(completions[0].input, (data.draw(outputs),)))
        stale = self.connections[which].complete(completions)
        assert stale == self.model.complete(completions)

    @staticmethod
    def output(queue: str, hop: str, group: str, delay: float) -> Output:
        return Output(queue, f"of {hop}", hop, group if queue.endswith(".fifo") else None, delay)

    @rule(which=st.integers(0, 1), data=st.data(), failure=st.none() | st.just('{"error":"E"}'))
    def dead_letter(self, which: int, data: st.DataObject, failure: str | None) -> None:
        handles = [handle for handle in self.pick(data, 3) if not handle.queue.startswith("dead")]
        letters = []
        for handle in handles:
            dead = "dead.fifo" if handle.queue.endswith(".fifo") else "dead"
            sent = self.model.by_handle[handle][0]
            letters.append(DeadLetter(handle, dead, sent.body, "hop", failure, sent.group))
        current = [self.model.current(handle) for handle in handles]
        stale = self.connections[which].dead_letter(letters)
        assert stale == [handle for handle, message in zip(handles, current, strict=True) if message is None]
        for letter, message in zip(letters, current, strict=True):
            if message is not None:
                self.model.remove(message)
                buried = self.model.put(letter.queue, letter.body, letter.group)
                buried.charges, buried.failure = message.charges, failure

    @rule(which=st.integers(0, 1), names=st.lists(queues, min_size=1, max_size=2, unique=True), sure=st.integers(0, 3))
    def purge(self, which: int, names: list[str], sure: int) -> None:
        if sure:
            return  # Too often it would leave nothing to look at.
        self.connections[which].purge(names)
        for message in [message for message in self.model.messages if message.queue in names]:
            self.model.remove(message)
        self.model.keys = {place: key for place, key in self.model.keys.items() if place[0] not in names}

    @rule(time=st.sampled_from([1, 1_000, 9_999, 10_000, 60_000, 299_999, 300_000, 3_600_000, 13 * DAY]))
    def time_passes(self, time: int) -> None:
        self.model.now += time

    @rule(which=st.integers(0, 1))
    def tidy(self, which: int) -> None:
        self.connections[which]._file.write(sqlite_queues.tidy)
        for message in list(self.model.messages):
            past = self.model.now - message.due_first >= RETENTION
            if past and message.visible_at <= self.model.now:
                self.model.remove(message)

    @rule(which=st.integers(0, 1))
    def reopen(self, which: int) -> None:
        self.connections[which].close()
        self.connections[which] = SQLiteConnection(self.file, durable=False)
        self.connections[which]._tidy_at = math.inf

    # -- always -------------------------------------------------------------------------------------------------

    @invariant()
    def depths_agree(self) -> None:
        if hasattr(self, "connections"):
            for queue in QUEUES:
                assert self.connections[0].depth(queue) == self.model.depth(queue), queue

    @invariant()
    def a_look_is_never_wrong(self) -> None:
        """What may be received now is not slept through (``next_due`` may say "now" too often, never too late)."""
        if hasattr(self, "connections"):
            for queue in QUEUES:
                if any(self.model.ready(queue).values()):
                    due = self.connections[1]._file.read(lambda session, name=queue: session.next_due([name]))  # type: ignore[misc]
                    assert due == 0


def text_of(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


TEMPLATE: list[Path] = []
SQLiteMachine.TestCase.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=40, derandomize=True, database=None, deadline=None
)


def test_the_broker_follows_the_model() -> None:
    with template() as path:
        TEMPLATE[:] = [path]
        SQLiteMachine.TestCase("runTest").runTest()
