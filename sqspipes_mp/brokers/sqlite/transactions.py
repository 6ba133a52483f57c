"""Programs: transactions on the SQLite file, each of them one call into C (any process).

A thread that takes the file's write lock and then waits for the GIL (another thread may keep it for seconds, in a
regular expression, say) stops every process that wants to write. So no transaction returns to Python between lock and
commit:

1. The steps of the transaction are *staged*: rows of a temporary table of the connection. That locks nothing.
2. One INSERT into the view of a *program*, a transaction by itself, runs a trigger for each staged step.
3. The results are read from other temporary tables: ``leases`` (the messages found), ``taken`` (the messages received).

A *place* is the number of a completion, letter or handle in the caller's list. A *stream* is an input whose outputs
come in several calls; while it lives, the hop ids of its outputs are kept as *keys*, so that none is sent twice. A
stream has the number of its first message. A message that continues another one continues its stream, too.

The *kind* of a queue, in the column ``fifo``, is 0 for a standard queue, 1 for a FIFO queue, and 2 for a standard queue
whose messages have tenants, who take turns. A tenant is a group with a negative number: no order, no blocking. Its
``head`` is when it was last served (milliseconds times ``TICKS``, and a count), and it is ready from then or from its
earliest due message on, whichever is later; so a receive takes from the tenants that were served longest ago, and a new
one joins at the end. On a queue with tenants, the messages without one are those of the tenant ''.
"""

import sqlite3
from collections.abc import Callable, Sequence
from enum import IntEnum, StrEnum
from functools import cache
from itertools import chain
from typing import Any

#: Milliseconds for which a hop id is remembered after its input was deleted: SQS's deduplication interval (Amazon SQS
#: Developer Guide, "Exactly-once processing in Amazon SQS").
WINDOW = 300_000
#: Milliseconds for which a hop id with ``Key.AGAIN`` is remembered: longer than a generator takes to be run again.
AGAIN = 14 * 86_400_000
#: Milliseconds for which a message is kept: SQS's longest retention (Amazon SQS API Reference, CreateQueue).
RETENTION = 14 * 86_400_000
#: Deliveries after which a message moves to its queue's dead-letter queue, whatever the engine does: SQS's highest
#: maxReceiveCount (Amazon SQS API Reference, SetQueueAttributes, RedrivePolicy).
MAX_RECEIVES = 1_000
#: Rows staged by one statement. Each statement releases the GIL and waits for the thread of the user's function.
_AT_ONCE = 20
#: Most messages that ``Step.RETIRE`` checks among the oldest ones, and most that it deletes of those long visible.
_OLDEST = 100
#: Tenants served in one millisecond that stay in their order.
TICKS = 1_024
#: Text of the error for a session with an outdated list of queues.
CHANGED = "sqspipes_mp: the queues are others now"
#: Text of the error of ``pass_on`` for an input with a stream.
STREAMED = "sqspipes_mp: there is a stream"


class Step(IntEnum):
    """Kinds of staged rows. Each kind uses the columns in brackets."""

    #: End the transaction if the list of queues has changed (seq: the session's generation).
    OPEN = 0
    #: Find the message of a receipt (place, queue, fifo, seq, receives; flag: not behind a stale one of its group).
    FIND = 1
    #: Make the input a stream (place).
    STREAM = 2
    #: Send a message (place, queue, fifo, hop, grp, body; number: of the message in this call; millis: delay;
    #: flag: one of ``Key``).
    OUTPUT = 3
    #: Delete the input (place; flag: its stream goes on with the last output, if that was sent).
    REMOVE = 4
    #: Hide a message (place; millis: from now; number: failed attempts so far).
    EXTEND = 5
    #: Move a message to a dead-letter queue (place, queue, fifo, number, hop, grp, origin, source, failure, body).
    DEAD_LETTER = 6
    #: End of a call: find when its FIFO groups are ready, remove expired keys (number: of messages sent).
    CLOSE = 7
    #: Receive (queue, fifo; millis: visibility timeout; number: most messages in all; seq: the dead-letter queue;
    #: receives: its kind).
    TAKE = 8
    #: The outputs of this place have no input (place).
    SOURCE = 9
    #: Remove expired keys and streams (number: most of each).
    SWEEP = 10
    #: Delete messages past their retention.
    RETIRE = 11
    #: Create a queue (fifo; hop: name; grp: its dead-letter queue; body: visibility timeout).
    CREATE = 12
    #: Empty a queue (queue; flag: delete it, too).
    EMPTY = 13
    #: Record that a value's message ends (place; queue, hop: the value's key; number: of the row in this call; flag:
    #: whether it is kept; body: the result in JSON, NULL: none). Before the step that deletes or moves the message.
    END = 14
    #: Note that the user's keys came (queue).
    KEYED = 15
    #: Make a standard queue one with tenants (queue).
    TENANTS = 16


class Key(IntEnum):
    """Time for which a hop id is remembered that was sent without an input, or to a FIFO queue."""

    #: ``WINDOW`` milliseconds.
    WINDOW = 0
    #: ``AGAIN`` milliseconds.
    AGAIN = 1
    #: Until the queue is purged.
    FOREVER = 2
    #: Not at all: the message is sent without a check.
    NONE = 3
    #: ``WINDOW`` milliseconds; the message takes the input's place, and with it the input's stream.
    CONTINUES = 4


#: Columns of a staged row after kind and place.
_NUMBERS = ("queue", "fifo", "seq", "receives", "flag", "millis", "number")
_TEXTS = ("hop", "grp", "origin", "source", "failure", "body")
_COLUMNS = ("kind", "place", *_NUMBERS, *_TEXTS)
#: Columns of a row for ``pass_on``: one row for each output, one for an input without outputs (``queue`` NULL).
#: ``queue`` is the output's queue, ``flag`` the input's.
_PASS = ("place", "seq", "receives", "flag", "queue", "millis", "number", "body")
Row = tuple[Any, ...]


def row(
    kind: Step,
    place: int = 0,
    *,
    queue: int | None = None,
    fifo: int = 0,
    seq: int | None = None,
    receives: int = 0,
    flag: int = 0,
    millis: int = 0,
    number: int = 0,
    hop: str | None = None,
    grp: str | None = None,
    origin: str | None = None,
    source: str | None = None,
    failure: str | None = None,
    body: Any = None,
) -> Row:
    """Return a row to stage; ``Step`` says which columns a kind uses."""
    return kind, place, queue, fifo, seq, receives, flag, millis, number, hop, grp, origin, source, failure, body


#: The stream of a message: its own number, or that of the message whose stream it continues.
_STREAM = "CASE WHEN streamed < 0 THEN -streamed WHEN streamed THEN seq END"
#: Condition for an output whose hop id is remembered: it has no input, or a stream, or is sent to a FIFO queue.
_KEYED = "(l.seq IS NULL OR l.stream OR NEW.fifo = 1) AND NEW.flag != 3"
#: The first message of a group that was never received.
_FIRST_FRESH = "(SELECT seq FROM messages WHERE grp = NEW.id AND receives = 0 ORDER BY seq LIMIT 1)"


def _end(view: str) -> str:
    """Return the trigger of the step END of a program."""
    return f"""
CREATE TEMP TRIGGER {view}_end INSTEAD OF INSERT ON {view} WHEN NEW.kind = {Step.END} BEGIN
    INSERT INTO ends (queue, token, seq, kept, result)
        SELECT NEW.queue, s.hop, (SELECT next_seq FROM meta) + NEW.number, NEW.flag, s.body
        FROM leases AS l, staged AS s WHERE l.place = NEW.place AND l.seq IS NOT NULL AND s.rowid = NEW.row;
END;
"""  # noqa: S608


def _view(view: str, *, finds: bool = False) -> str:
    """Return a program's view with the triggers of the steps OPEN and CLOSE, and of FIND where it ``finds``."""
    text = f"""
CREATE TEMP VIEW {view} AS SELECT kind, place, {", ".join(_NUMBERS)}, 0 AS row, 0 AS now FROM staged;
CREATE TEMP TRIGGER {view}_open INSTEAD OF INSERT ON {view} WHEN NEW.kind = {Step.OPEN} BEGIN
    SELECT RAISE(ABORT, '{CHANGED}') FROM meta WHERE generation != NEW.seq;
    DELETE FROM leases; DELETE FROM stale_groups; DELETE FROM touched; DELETE FROM taken;
END;
CREATE TEMP TRIGGER {view}_close INSTEAD OF INSERT ON {view} WHEN NEW.kind = {Step.CLOSE} BEGIN
    UPDATE meta SET next_seq = next_seq + NEW.number WHERE NEW.number;
    INSERT INTO readying SELECT grp FROM touched;
    -- Up to two keys are removed for each one added, so that expired keys cannot pile up.
    INSERT INTO sweeping SELECT n, NEW.now FROM (SELECT 2 * count(*) AS n
        FROM staged AS s JOIN leases AS l USING (place)
        WHERE s.kind = {Step.OUTPUT} AND s.flag NOT IN ({Key.FOREVER}, {Key.NONE})
            AND (l.seq IS NULL OR l.stream OR s.fifo = 1)) WHERE n;
    DELETE FROM staged;
END;
"""  # noqa: S608
    if not finds:
        return text
    return f"""{text}
CREATE TEMP TRIGGER {view}_find INSTEAD OF INSERT ON {view} WHEN NEW.kind = {Step.FIND} BEGIN
    -- As on SQS: a FIFO receipt ends with its visibility, and nothing later of its group may be completed after that:
    -- it would overtake the message that another worker may have by now.
    INSERT OR IGNORE INTO stale_groups SELECT grp FROM messages
        WHERE seq = NEW.seq AND queue = NEW.queue AND NEW.fifo AND (receives != NEW.receives OR visible_at < NEW.now);
    INSERT INTO leases
        SELECT NEW.place, seq, grp, {_STREAM}, queue, charges, coalesce(first_sent_at, sent_at), 0 FROM messages
        WHERE seq = NEW.seq AND queue = NEW.queue AND receives = NEW.receives
            AND NOT (NEW.fifo AND visible_at < NEW.now)
            AND NOT (NEW.flag AND coalesce(grp, 0) IN (SELECT grp FROM stale_groups));
END;
"""  # noqa: S608


_SCHEMA = f"""
CREATE TEMP TABLE staged (kind INTEGER, place INTEGER, {", ".join(f"{name} INTEGER" for name in _NUMBERS)},
    {", ".join(f"{name} TEXT" for name in _TEXTS)});
-- The messages that the steps of this call have found, by place.
-- ``stream``: the number of the message's stream; NULL: it is none.
CREATE TEMP TABLE leases (place INTEGER PRIMARY KEY, seq INTEGER, grp INTEGER, stream INTEGER, queue INTEGER,
    charges INTEGER, sent_at INTEGER, fresh INTEGER);
-- FIFO groups with a stale receipt in this call.
CREATE TEMP TABLE stale_groups (grp INTEGER PRIMARY KEY);
-- FIFO groups whose messages have changed: CLOSE finds when they are ready.
CREATE TEMP TABLE touched (grp INTEGER PRIMARY KEY);
-- The messages received; ``moved``: moved to the dead-letter queue instead.
CREATE TEMP TABLE taken (seq INTEGER, receives INTEGER, charges INTEGER, sent_at INTEGER, grp TEXT, failure TEXT,
    queue INTEGER, moved INTEGER);
-- Rows that the running sweep may still remove.
CREATE TEMP TABLE budget (rest INTEGER);
INSERT INTO budget VALUES (0);

-- Finds the time from which a group is ready: its oldest message is visible, and none of its messages is in flight.
-- Messages in flight are always the first ones of their group, since a receive takes the first ones.
CREATE TEMP VIEW readying AS SELECT 0 AS id;
CREATE TEMP TRIGGER ready_tenant INSTEAD OF INSERT ON readying WHEN NEW.id < 0 BEGIN
    DELETE FROM groups WHERE id = NEW.id AND NOT EXISTS (SELECT 1 FROM messages WHERE grp = NEW.id);
    UPDATE groups SET ready_at = max(head / {TICKS},
        (SELECT min(visible_at) FROM messages WHERE grp = NEW.id AND grp < 0)) WHERE id = NEW.id;
END;
CREATE TEMP TRIGGER ready_group INSTEAD OF INSERT ON readying WHEN NEW.id > 0 BEGIN
    DELETE FROM groups WHERE id = NEW.id AND NOT EXISTS (SELECT 1 FROM messages WHERE grp = NEW.id);
    UPDATE groups SET (head, ready_at) = (
        SELECT m.seq, max(m.visible_at, coalesce((SELECT max(visible_at) FROM messages
            WHERE grp = NEW.id AND seq < coalesce({_FIRST_FRESH}, 9223372036854775807)), 0))
        FROM messages AS m WHERE m.grp = NEW.id ORDER BY m.seq LIMIT 1) WHERE id = NEW.id;
END;

-- Keys are found first and deleted one by one: for "(queue, hop) IN (SELECT ...)" SQLite reads all keys of the queue.
CREATE TEMP VIEW forgetting AS SELECT 0 AS queue, '' AS hop;
CREATE TEMP TRIGGER forget INSTEAD OF INSERT ON forgetting BEGIN
    DELETE FROM keys WHERE queue = NEW.queue AND hop = NEW.hop;
    UPDATE budget SET rest = rest - 1;
END;
CREATE TEMP VIEW ended AS SELECT 0 AS seq;
CREATE TEMP TRIGGER forget_stream INSTEAD OF INSERT ON ended WHEN (SELECT rest FROM budget) > 0 BEGIN
    INSERT INTO forgetting SELECT queue, hop FROM keys WHERE stream = NEW.seq LIMIT (SELECT rest FROM budget);
    DELETE FROM streams WHERE seq = NEW.seq AND NOT EXISTS (SELECT 1 FROM keys WHERE stream = NEW.seq);
    UPDATE budget SET rest = rest - 1;
END;
CREATE TEMP VIEW sweeping AS SELECT 0 AS rest, 0 AS now;
CREATE TEMP TRIGGER sweep INSTEAD OF INSERT ON sweeping BEGIN
    INSERT INTO forgetting SELECT queue, hop FROM keys WHERE expires <= NEW.now ORDER BY expires LIMIT NEW.rest;
    UPDATE budget SET rest = NEW.rest;
    INSERT INTO ended SELECT seq FROM streams WHERE expires <= NEW.now ORDER BY expires LIMIT NEW.rest;
END;

-- A dead letter has no key: its message leaves its own queue in the same transaction, so it cannot come twice.
CREATE TEMP VIEW dead_letters AS SELECT 0 AS queue, 0 AS fifo, 0 AS seq, 0 AS now, 0 AS charges, 0 AS sent_at,
    '' AS grp, '' AS hop, '' AS origin, '' AS source, '' AS failure, '' AS body, 0 AS old;
CREATE TEMP TRIGGER insert_dead INSTEAD OF INSERT ON dead_letters BEGIN
    INSERT OR IGNORE INTO groups (id, queue, name, ready_at, head) SELECT
        CASE NEW.fifo WHEN 2 THEN -NEW.seq ELSE NEW.seq END, NEW.queue, NEW.grp, NEW.now,
        CASE NEW.fifo WHEN 2 THEN NEW.now * {TICKS} + NEW.seq % {TICKS} ELSE NEW.seq END WHERE NEW.fifo;
    INSERT OR IGNORE INTO touched SELECT id FROM groups WHERE NEW.fifo = 2 AND queue = NEW.queue AND name = NEW.grp;
    INSERT INTO messages (seq, queue, visible_at, receives, charges, streamed, sent_at, grp, first_sent_at, hop, origin,
        source, failure, body)
    VALUES (NEW.seq, NEW.queue, NEW.now, 0, NEW.charges, 0, NEW.now,
        CASE WHEN NEW.fifo THEN (SELECT id FROM groups WHERE queue = NEW.queue AND name = NEW.grp) END,
        NEW.sent_at, NEW.hop, NEW.origin, NEW.source, NEW.failure, NEW.body);
    UPDATE streams SET expires = NEW.now + {WINDOW}
        WHERE seq = (SELECT {_STREAM} FROM messages WHERE seq = NEW.old);
    DELETE FROM messages WHERE seq = NEW.old;
END;

{_view("extending", finds=True)}
{_view("moving", finds=True)}
{_view("completing", finds=True)}
{_end("moving")}
{_end("completing")}
{_view("taking")}
{_view("tending")}
CREATE TEMP TRIGGER source INSTEAD OF INSERT ON completing WHEN NEW.kind = {Step.SOURCE} BEGIN
    INSERT INTO leases (place, fresh) VALUES (NEW.place, 0);
END;
CREATE TEMP TRIGGER keyed INSTEAD OF INSERT ON completing WHEN NEW.kind = {Step.KEYED} BEGIN
    UPDATE queues SET keyed_since = NEW.now WHERE id = NEW.queue AND keyed_since IS NULL;
END;
CREATE TEMP TRIGGER stream INSTEAD OF INSERT ON completing WHEN NEW.kind = {Step.STREAM} BEGIN
    INSERT OR IGNORE INTO streams (seq, queue) SELECT seq, queue FROM leases WHERE place = NEW.place AND stream IS NULL
        AND seq IS NOT NULL;
    UPDATE messages SET streamed = 1 WHERE seq = (SELECT seq FROM leases WHERE place = NEW.place AND stream IS NULL);
    UPDATE leases SET stream = seq WHERE place = NEW.place AND stream IS NULL;
END;
CREATE TEMP TRIGGER output INSTEAD OF INSERT ON completing WHEN NEW.kind = {Step.OUTPUT} BEGIN
    INSERT INTO keys (queue, hop, stream, expires)
        SELECT NEW.queue, s.hop, l.stream, CASE WHEN l.stream OR NEW.flag = {Key.FOREVER} THEN NULL
            ELSE NEW.now + CASE NEW.flag WHEN {Key.AGAIN} THEN {AGAIN} ELSE {WINDOW} END END
        FROM leases AS l, staged AS s WHERE l.place = NEW.place AND s.rowid = NEW.row AND {_KEYED}
        ON CONFLICT (queue, hop) DO UPDATE SET stream = excluded.stream, expires = excluded.expires
            WHERE keys.expires <= NEW.now OR (SELECT s.expires FROM streams AS s WHERE s.seq = keys.stream) <= NEW.now;
    UPDATE leases SET fresh = CASE WHEN {_KEYED.replace("l.", "")} THEN changes() ELSE 1 END WHERE place = NEW.place;
    -- A number of a message was never a group's.
    INSERT OR IGNORE INTO groups (id, queue, name, ready_at, head)
        SELECT ((SELECT next_seq FROM meta) + NEW.number) * CASE NEW.fifo WHEN 2 THEN -1 ELSE 1 END,
            NEW.queue, s.grp, NEW.now + NEW.millis,
            CASE NEW.fifo WHEN 2 THEN NEW.now * {TICKS} + ((SELECT next_seq FROM meta) + NEW.number) % {TICKS}
                ELSE (SELECT next_seq FROM meta) + NEW.number END
        FROM leases AS l, staged AS s WHERE NEW.fifo AND l.place = NEW.place AND l.fresh AND s.rowid = NEW.row;
    INSERT INTO messages (seq, queue, visible_at, receives, charges, streamed, sent_at, grp, first_sent_at, body)
        SELECT (SELECT next_seq FROM meta) + NEW.number, NEW.queue, NEW.now + NEW.millis, 0, 0,
            CASE WHEN NEW.flag = {Key.CONTINUES} THEN -coalesce(l.stream, 0) ELSE 0 END, NEW.now + NEW.millis,
            CASE WHEN NEW.fifo THEN (SELECT id FROM groups WHERE queue = NEW.queue AND name = s.grp) END,
            CASE WHEN NEW.millis THEN NEW.now END, s.body
        FROM leases AS l, staged AS s WHERE l.place = NEW.place AND l.fresh AND s.rowid = NEW.row;
    INSERT OR IGNORE INTO touched SELECT g.id FROM groups AS g, staged AS s
        WHERE NEW.fifo = 2 AND s.rowid = NEW.row AND g.queue = NEW.queue AND g.name = s.grp;
END;
CREATE TEMP TRIGGER remove INSTEAD OF INSERT ON completing WHEN NEW.kind = {Step.REMOVE} BEGIN
    DELETE FROM messages WHERE seq = (SELECT seq FROM leases WHERE place = NEW.place);
    UPDATE streams SET expires = NEW.now + {WINDOW}
        WHERE seq = (SELECT stream FROM leases WHERE place = NEW.place AND NOT (NEW.flag AND fresh));
    INSERT OR IGNORE INTO touched SELECT grp FROM leases WHERE place = NEW.place AND grp IS NOT NULL;
END;
-- The way of nearly all messages, on standard queues: by sets, at a third of the cost of step by step.
CREATE TEMP VIEW passing AS SELECT 0 AS now, 0 AS generation;
CREATE TEMP TRIGGER pass INSTEAD OF INSERT ON passing BEGIN
    SELECT RAISE(ABORT, '{CHANGED}') FROM meta WHERE generation != NEW.generation;
    DELETE FROM leases;
    INSERT OR IGNORE INTO leases (place, seq, stream) SELECT s.place, m.seq, m.streamed OR m.grp < 0
        FROM staged AS s CROSS JOIN messages AS m ON m.seq = s.seq WHERE m.queue = s.flag AND m.receives = s.receives;
    SELECT RAISE(ABORT, '{STREAMED}') FROM leases WHERE stream;
    INSERT INTO messages (seq, queue, visible_at, receives, charges, streamed, sent_at, first_sent_at, body)
        SELECT (SELECT next_seq FROM meta) + s.number, s.queue, NEW.now + s.millis, 0, 0, 0, NEW.now + s.millis,
            CASE WHEN s.millis THEN NEW.now END, s.body
        FROM staged AS s WHERE s.queue IS NOT NULL AND s.place IN (SELECT place FROM leases);
    DELETE FROM messages WHERE seq IN (SELECT seq FROM leases);
    UPDATE meta SET next_seq = next_seq + (SELECT max(number) + 1 FROM staged)
        WHERE EXISTS (SELECT 1 FROM staged WHERE queue IS NOT NULL);
    DELETE FROM staged;
END;
CREATE TEMP TRIGGER extend INSTEAD OF INSERT ON extending WHEN NEW.kind = {Step.EXTEND} BEGIN
    UPDATE messages SET visible_at = NEW.now + NEW.millis, charges = max(charges, NEW.number)
        WHERE seq = (SELECT seq FROM leases WHERE place = NEW.place);
    INSERT OR IGNORE INTO touched SELECT grp FROM leases WHERE place = NEW.place AND grp IS NOT NULL;
END;
CREATE TEMP TRIGGER dead_letter INSTEAD OF INSERT ON moving WHEN NEW.kind = {Step.DEAD_LETTER} BEGIN
    INSERT INTO dead_letters SELECT NEW.queue, NEW.fifo, (SELECT next_seq FROM meta) + NEW.number, NEW.now, l.charges,
            l.sent_at, s.grp, s.hop, s.origin, s.source, s.failure, s.body, l.seq
        FROM leases AS l, staged AS s WHERE l.place = NEW.place AND s.rowid = NEW.row;
    INSERT OR IGNORE INTO touched SELECT grp FROM leases WHERE place = NEW.place AND grp IS NOT NULL;
END;

-- A receive takes all visible messages before the first hidden one of a group, as far as there is room.
CREATE TEMP VIEW due_groups AS SELECT 0 AS id, '' AS name, 0 AS queue, 0 AS now, 0 AS most;
CREATE TEMP TRIGGER take_group INSTEAD OF INSERT ON due_groups
    WHEN NEW.most > (SELECT count(*) FROM taken WHERE NOT moved) BEGIN
    INSERT INTO taken SELECT m.seq, m.receives, m.charges, coalesce(m.first_sent_at, m.sent_at), NEW.name, m.failure,
            NEW.queue, 0
        FROM messages AS m WHERE m.grp = NEW.id AND m.seq < coalesce((SELECT min(seq) FROM (SELECT seq, visible_at
                FROM messages WHERE grp = NEW.id ORDER BY seq LIMIT NEW.most) WHERE visible_at > NEW.now),
            9223372036854775807)
        ORDER BY m.seq LIMIT NEW.most - (SELECT count(*) FROM taken WHERE NOT moved);
    INSERT OR IGNORE INTO touched VALUES (NEW.id);
END;
-- A receive takes an equal share from each tenant that is ready; the next try takes what is left of their messages.
CREATE TEMP VIEW due_tenants AS SELECT 0 AS id, '' AS name, 0 AS queue, 0 AS now, 0 AS most, 0 AS share, 0 AS again;
CREATE TEMP TRIGGER take_tenant INSTEAD OF INSERT ON due_tenants
    WHEN NEW.most > (SELECT count(*) FROM taken WHERE NOT moved) BEGIN
    INSERT INTO taken SELECT m.seq, m.receives, m.charges, coalesce(m.first_sent_at, m.sent_at), nullif(NEW.name, ''),
            m.failure, NEW.queue, 0
        FROM messages AS m WHERE m.grp = NEW.id AND m.grp < 0 AND m.visible_at <= NEW.now
            AND (NOT NEW.again OR m.seq NOT IN (SELECT seq FROM taken))
        ORDER BY m.visible_at, m.receives, m.seq
        LIMIT min(NEW.share, NEW.most - (SELECT count(*) FROM taken WHERE NOT moved));
    UPDATE groups SET head = NEW.now * {TICKS} + (SELECT next_seq FROM meta) % {TICKS} WHERE id = NEW.id;
    UPDATE meta SET next_seq = next_seq + 1;
    INSERT OR IGNORE INTO touched VALUES (NEW.id);
END;
CREATE TEMP TRIGGER take INSTEAD OF INSERT ON taking WHEN NEW.kind = {Step.TAKE} BEGIN
    INSERT INTO taken SELECT seq, receives, charges, coalesce(first_sent_at, sent_at), NULL, failure, queue, 0
        FROM messages WHERE NOT NEW.fifo AND queue = NEW.queue AND visible_at <= NEW.now
        ORDER BY visible_at, receives, seq LIMIT max(0, NEW.number - (SELECT count(*) FROM taken WHERE NOT moved));
    INSERT INTO due_groups SELECT id, name, queue, NEW.now, NEW.number FROM groups
        WHERE queue = CASE NEW.fifo WHEN 1 THEN NEW.queue END AND ready_at <= NEW.now
        ORDER BY ready_at, head LIMIT NEW.number;
    INSERT INTO due_tenants SELECT id, name, queue, NEW.now, NEW.number, (SELECT max(1, NEW.number / count(*))
            FROM (SELECT 1 FROM groups WHERE queue = NEW.queue AND ready_at <= NEW.now LIMIT NEW.number)), 0 FROM groups
        WHERE queue = CASE NEW.fifo WHEN 2 THEN NEW.queue END AND ready_at <= NEW.now
        ORDER BY ready_at, head LIMIT NEW.number;
    INSERT INTO due_tenants SELECT id, name, queue, NEW.now, NEW.number, NEW.number, 1 FROM groups
        WHERE queue = CASE WHEN NEW.fifo = 2 AND NEW.number > (SELECT count(*) FROM taken WHERE NOT moved)
            THEN NEW.queue END AND ready_at <= NEW.now ORDER BY ready_at, head LIMIT NEW.number;
    UPDATE taken SET moved = 1 WHERE queue = NEW.queue AND receives >= {MAX_RECEIVES} AND NEW.seq IS NOT NULL;
    INSERT INTO dead_letters SELECT NEW.seq, NEW.receives, (SELECT next_seq FROM meta) + t.rowid, NEW.now,
            t.charges, t.sent_at, coalesce(t.grp, t.seq), NULL, NULL,
            (SELECT name FROM queues WHERE id = NEW.queue), NULL, m.body, t.seq
        FROM taken AS t JOIN messages AS m ON m.seq = t.seq WHERE t.moved AND t.queue = NEW.queue;
    UPDATE meta SET next_seq = next_seq + (SELECT max(rowid) FROM taken) + 1
        WHERE EXISTS (SELECT 1 FROM taken WHERE moved AND queue = NEW.queue);
    UPDATE messages SET visible_at = NEW.now + NEW.millis, receives = receives + 1
        WHERE seq IN (SELECT seq FROM taken WHERE queue = NEW.queue AND NOT moved);
    INSERT INTO readying SELECT grp FROM touched;
    DELETE FROM touched;
END;

CREATE TEMP TRIGGER sweep_now INSTEAD OF INSERT ON tending WHEN NEW.kind = {Step.SWEEP} BEGIN
    INSERT INTO sweeping VALUES (NEW.number, NEW.now);
END;
CREATE TEMP TRIGGER retire INSTEAD OF INSERT ON tending WHEN NEW.kind = {Step.RETIRE} BEGIN
    INSERT INTO leases (place, seq, grp, stream) SELECT m.seq, m.seq, m.grp, {_STREAM}
        FROM (SELECT seq, queue, grp, streamed, sent_at, visible_at FROM messages
            ORDER BY seq LIMIT {_OLDEST}) AS m LEFT JOIN queues AS q ON q.id = m.queue
        WHERE NEW.now - m.sent_at >= coalesce(q.retention, {RETENTION}) AND m.visible_at <= NEW.now;
    -- Delayed messages may keep later ones out of the oldest. A message visible for its retention is past it.
    INSERT OR IGNORE INTO leases (place, seq, grp, stream) SELECT m.seq, m.seq, m.grp, {_STREAM}
        FROM queues AS q CROSS JOIN messages AS m ON m.queue = q.id AND m.visible_at <= NEW.now - q.retention
        LIMIT {_OLDEST};
    DELETE FROM messages WHERE seq IN (SELECT seq FROM leases);
    UPDATE streams SET expires = NEW.now + {WINDOW} WHERE seq IN (SELECT stream FROM leases);
    INSERT OR IGNORE INTO touched SELECT grp FROM leases WHERE grp IS NOT NULL;
END;

CREATE TEMP TRIGGER create_queue INSTEAD OF INSERT ON tending WHEN NEW.kind = {Step.CREATE} BEGIN
    UPDATE meta SET generation = generation + 1;
    INSERT INTO queues (id, name, fifo, visibility, dead, created_at, retention)
        SELECT (SELECT generation FROM meta), s.hop, NEW.fifo, s.body, s.grp, NEW.now, {RETENTION}
        FROM staged AS s WHERE s.rowid = NEW.row;
END;
-- A tenant's messages are found by an index of their own, which ``queues.with_tenants`` has made.
CREATE TEMP TRIGGER tenants INSTEAD OF INSERT ON tending WHEN NEW.kind = {Step.TENANTS} BEGIN
    UPDATE queues SET fifo = 2 WHERE id = NEW.queue AND fifo = 0;
    UPDATE meta SET generation = generation + 1, next_seq = next_seq + 1;
    INSERT OR IGNORE INTO groups (id, queue, name, ready_at, head)
        SELECT 1 - (SELECT next_seq FROM meta), NEW.queue, '', NEW.now, NEW.now * {TICKS};
    UPDATE messages SET grp = (SELECT id FROM groups WHERE queue = NEW.queue AND name = '')
        WHERE queue = NEW.queue AND grp IS NULL;
    INSERT INTO readying SELECT id FROM groups WHERE queue = NEW.queue AND name = '';
END;
-- A queue is emptied at once, keys included, by a new number; the rows under the old number are garbage.
CREATE TEMP TRIGGER empty_queue INSTEAD OF INSERT ON tending WHEN NEW.kind = {Step.EMPTY} BEGIN
    UPDATE meta SET generation = generation + 1;
    UPDATE queues SET id = (SELECT generation FROM meta), keyed_since = NULL WHERE id = NEW.queue AND NOT NEW.flag;
    DELETE FROM queues WHERE id = NEW.queue;
    UPDATE streams SET expires = NEW.now + {WINDOW} WHERE queue = NEW.queue AND expires IS NULL;
    INSERT OR IGNORE INTO garbage (queue) VALUES (NEW.queue);
END;
"""  # noqa: S608
_FROM = f"SELECT kind, place, {', '.join(_NUMBERS)}, rowid, ? FROM staged ORDER BY rowid"  # noqa: S608
#: Removes keys of a queue, up to a limit: a transaction by itself.
FORGET_QUEUE = "INSERT INTO forgetting SELECT queue, hop FROM keys WHERE queue = ? LIMIT ?"
#: Finds when tenants are ready that are not yet: a transaction by itself.
READY_TENANTS = "INSERT INTO readying SELECT id FROM groups WHERE id < 0 AND ready_at > ?"


class Program(StrEnum):
    """The programs, each for some kinds of steps: a row costs a check of every trigger of its program."""

    #: FIND, SOURCE, KEYED, STREAM, OUTPUT, END, REMOVE, CLOSE.
    COMPLETE = f"INSERT INTO completing {_FROM}"
    #: FIND, EXTEND, CLOSE.
    EXTEND = f"INSERT INTO extending {_FROM}"
    #: FIND, END, DEAD_LETTER, CLOSE.
    MOVE = f"INSERT INTO moving {_FROM}"
    #: TAKE.
    TAKE = f"INSERT INTO taking {_FROM}"
    #: SWEEP, RETIRE, CREATE, EMPTY, TENANTS, CLOSE.
    TEND = f"INSERT INTO tending {_FROM}"


def install(db: sqlite3.Connection) -> None:
    """Create the programs' temporary tables, views and triggers in a connection."""
    db.executescript(_SCHEMA)


def run(db: sqlite3.Connection, program: Program, rows: Sequence[Row], clock: Callable[[], int]) -> int:
    """Run steps in one transaction; returns its time, which is read just before it, in the file's milliseconds.

    Raises ``sqlite3.IntegrityError`` with the text ``CHANGED`` where the first step is an OPEN of another generation.
    """
    db.execute("DELETE FROM staged")
    for start in range(0, len(rows), _AT_ONCE):
        some = rows[start : start + _AT_ONCE]
        db.execute(_stage(len(some)), tuple(chain.from_iterable(some)))
    now = clock()
    db.execute(program, (now,))
    return now


def pass_on(db: sqlite3.Connection, rows: Sequence[Row], generation: int, clock: Callable[[], int]) -> None:
    """Send and delete by sets in one transaction, on standard queues; each row has the columns ``_PASS``.

    Raises ``sqlite3.IntegrityError`` with the text ``CHANGED`` or ``STREAMED``; nothing was done then.
    """
    db.execute("DELETE FROM staged")
    for start in range(0, len(rows), _AT_ONCE):
        some = rows[start : start + _AT_ONCE]
        db.execute(_stage(len(some), _PASS), tuple(chain.from_iterable(some)))
    db.execute("INSERT INTO passing VALUES (?, ?)", (clock(), generation))


@cache
def _stage(count: int, columns: tuple[str, ...] = _COLUMNS) -> str:
    """Return the statement that stages ``count`` rows."""
    one = f"({', '.join('?' * len(columns))})"
    return f"INSERT INTO staged ({', '.join(columns)}) VALUES {', '.join([one] * count)}"  # noqa: S608
