"""The SQLite broker's tables and statements: text only (any process).

What is done to several messages is one step of one statement: SQLite's module lets go of the GIL at every step, and in
a busy worker each of those is a switch to the thread that runs the user's function.

``messages``  one row per message; ``receives`` numbers its deliveries, so ``seq`` and ``receives`` are its receipt.
``groups``    one row per FIFO group that has messages: when it may be received again, and its oldest message.
``keys``      hop ids that were accepted before. One lives until ``expires``, or as long as its ``stream`` lives.
``streams``   inputs whose outputs came in several calls: alive until the input is deleted, then until ``expires``.
``garbage``   ids of purged and deleted queues whose rows are still to be removed.
``owners``    whose the queues are; made by its first row, see ``sqlite_owners``.
``clocks``    see ``sqlite_session``: milliseconds to add to this boot's monotonic clock.

All times are integer milliseconds of that one clock. ``visible_at``, ``receives`` and ``streamed`` keep their stored
size from the send to the first receive: SQLite then overwrites the row in place and leaves a large body alone.
"""

from functools import cache

#: Marks the file as ours (``PRAGMA application_id``): ASCII "sqsp".
APPLICATION_ID = 0x73717370
#: Layout of the tables (``PRAGMA user_version``); another one is refused.
LAYOUT = 1

TABLES = (
    """CREATE TABLE meta (
        one INTEGER PRIMARY KEY CHECK (one = 1), token TEXT NOT NULL, generation INTEGER NOT NULL,
        next_seq INTEGER NOT NULL
    )""",
    "CREATE TABLE clocks (boot TEXT PRIMARY KEY, shift INTEGER NOT NULL, last INTEGER NOT NULL) WITHOUT ROWID",
    """CREATE TABLE queues (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, fifo INTEGER NOT NULL, visibility REAL NOT NULL, dead TEXT,
        created_at INTEGER NOT NULL, retention INTEGER NOT NULL
    )""",
    """CREATE TABLE messages (
        seq INTEGER PRIMARY KEY, queue INTEGER NOT NULL, visible_at INTEGER NOT NULL, receives INTEGER NOT NULL,
        charges INTEGER NOT NULL, streamed INTEGER NOT NULL, sent_at INTEGER NOT NULL, grp INTEGER,
        first_sent_at INTEGER, hop TEXT, origin TEXT, source TEXT, failure TEXT, body TEXT NOT NULL
    )""",
    "CREATE INDEX due ON messages (queue, visible_at, receives)",
    "CREATE INDEX turn ON messages (grp) WHERE grp IS NOT NULL",
    """CREATE TABLE groups (
        id INTEGER PRIMARY KEY, queue INTEGER NOT NULL, name TEXT NOT NULL, ready_at INTEGER NOT NULL,
        head INTEGER NOT NULL, UNIQUE (queue, name)
    )""",
    "CREATE INDEX ready ON groups (queue, ready_at, head)",
    """CREATE TABLE keys (
        queue INTEGER NOT NULL, hop TEXT NOT NULL, stream INTEGER, expires INTEGER, PRIMARY KEY (queue, hop)
    ) WITHOUT ROWID""",
    "CREATE INDEX keys_expires ON keys (expires) WHERE expires IS NOT NULL",
    "CREATE INDEX keys_stream ON keys (stream) WHERE stream IS NOT NULL",
    "CREATE TABLE streams (seq INTEGER PRIMARY KEY, queue INTEGER NOT NULL, expires INTEGER)",
    "CREATE INDEX streams_expires ON streams (expires) WHERE expires IS NOT NULL",
    "CREATE TABLE garbage (queue INTEGER PRIMARY KEY)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {LAYOUT}",
)

# What every transaction begins and ends with.
META = "SELECT generation, next_seq FROM meta"
SET_META = "UPDATE meta SET generation = ?, next_seq = ?"
QUEUES = "SELECT name, id, fifo, visibility, dead, retention FROM queues"

# Waiting: the earliest moment at which something may be received.
LOOK_STANDARD = "SELECT min(visible_at) FROM messages WHERE queue = ?"
LOOK_FIFO = "SELECT min(ready_at) FROM groups WHERE queue = ?"

# Receiving.
DUE = """SELECT seq, receives, charges, sent_at, first_sent_at, failure, body FROM messages
    WHERE queue = ? AND visible_at <= ? ORDER BY visible_at, receives, seq LIMIT ?"""
READY = "SELECT id, name FROM groups WHERE queue = ? AND ready_at <= ? ORDER BY ready_at, head LIMIT ?"
IN_TURN = """SELECT seq, receives, charges, sent_at, first_sent_at, failure, body, visible_at FROM messages
    WHERE grp = ? ORDER BY seq LIMIT ?"""
#: Messages that one step finds, takes, sends, extends or deletes; fewer are filled up with 0, which is nobody's number.
AT_ONCE = 20
_these = f"WHERE seq IN ({', '.join('?' * AT_ONCE)})"
TAKE = f"UPDATE messages SET visible_at = ?, receives = receives + 1 {_these}"

# Sending, deleting, extending.
FIND = f"""SELECT json_group_array(json_array(seq, receives, visible_at, queue, grp, streamed, charges,
    coalesce(first_sent_at, sent_at))) FROM messages {_these}"""
SEND_DEAD = """INSERT INTO messages (seq, queue, visible_at, receives, charges, streamed, sent_at, grp, first_sent_at,
        hop, origin, source, failure, body)
    VALUES (?, ?, ?, 0, ?, 0, ?, ?, ?, ?, ?, ?, ?, ?)"""
DELETE = f"DELETE FROM messages {_these}"
EXTEND = f"UPDATE messages SET visible_at = ?, charges = charges + ? {_these}"

# FIFO groups. Received messages are a prefix of their group, since a receive takes its first ones.
PREFIX = "SELECT seq, visible_at, receives FROM messages WHERE grp = ? ORDER BY seq"
GROUP = "SELECT id FROM groups WHERE queue = ? AND name = ?"
NEW_GROUP = "INSERT INTO groups (queue, name, ready_at, head) VALUES (?, ?, ?, ?)"
BLOCK = "UPDATE groups SET ready_at = ? WHERE id = ?"
SETTLE = "UPDATE groups SET ready_at = ?, head = ? WHERE id = ?"
DROP_GROUP = "DELETE FROM groups WHERE id = ?"

# Deduplication: the row count says whether the hop id is new.
REMEMBER = """INSERT INTO keys (queue, hop, stream, expires) VALUES (?, ?, ?, ?)
    ON CONFLICT (queue, hop) DO UPDATE SET stream = excluded.stream, expires = excluded.expires
    WHERE keys.expires <= ? OR (SELECT s.expires FROM streams AS s WHERE s.seq = keys.stream) <= ?"""
START_STREAM = "INSERT OR IGNORE INTO streams (seq, queue) VALUES (?, ?)"
MARK_STREAMED = "UPDATE messages SET streamed = 1 WHERE seq = ?"
END_STREAM = "UPDATE streams SET expires = ? WHERE seq = ?"
END_STREAMS = "UPDATE streams SET expires = ? WHERE queue = ? AND expires IS NULL"
# Keys are found first and deleted one by one: for "(queue, hop) IN (SELECT ...)" SQLite reads the whole queue's.
EXPIRED_KEYS = "SELECT queue, hop FROM keys WHERE expires <= ? ORDER BY expires LIMIT ?"
STREAM_KEYS = "SELECT queue, hop FROM keys WHERE stream = ? LIMIT ?"
QUEUE_KEYS = "SELECT queue, hop FROM keys WHERE queue = ? LIMIT ?"
#: Those of the user's keys: they live until their queue is purged.
KEYED = "SELECT 1 FROM keys WHERE queue = ? AND hop = ? AND stream IS NULL AND expires IS NULL"
FORGET = "DELETE FROM keys WHERE queue = ? AND hop = ?"
ENDED_STREAM = "SELECT seq FROM streams WHERE expires <= ? ORDER BY expires LIMIT 1"
DROP_STREAM = "DELETE FROM streams WHERE seq = ?"

# Queues.
CREATE_QUEUE = (
    "INSERT INTO queues (id, name, fifo, visibility, dead, created_at, retention) VALUES (?, ?, ?, ?, ?, ?, ?)"
)
RENUMBER_QUEUE = "UPDATE queues SET id = ? WHERE id = ?"
DELETE_QUEUE = "DELETE FROM queues WHERE id = ?"
BODIES = "SELECT body, seq, failure FROM messages WHERE queue = ?"
COUNT_VISIBLE = "SELECT count(*) FROM messages WHERE queue = ? AND visible_at <= ?"
COUNT_HIDDEN = "SELECT count(*), coalesce(sum(receives > 0), 0) FROM messages WHERE queue = ? AND visible_at > ?"

# Owners of queues.
HAS_OWNERS = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = 'owners'"
CREATE_OWNERS = """CREATE TABLE IF NOT EXISTS owners (
    queue TEXT PRIMARY KEY, domain TEXT NOT NULL, created_at INTEGER NOT NULL
) WITHOUT ROWID"""
OWNERS = "SELECT q.name, o.domain FROM queues AS q JOIN owners AS o ON o.queue = q.name AND o.created_at = q.created_at"
OWN = "INSERT OR REPLACE INTO owners (queue, domain, created_at) SELECT name, ?, created_at FROM queues WHERE name = ?"
DISOWN = "DELETE FROM owners WHERE queue = ?"
COUNT = "SELECT count(*) FROM messages WHERE queue = ?"

# Rows of purged and deleted queues, and of messages past their retention.
ADD_GARBAGE = "INSERT OR IGNORE INTO garbage (queue) VALUES (?)"
GARBAGE = "SELECT queue FROM garbage LIMIT 1"
SWEEP_MESSAGES = "DELETE FROM messages WHERE seq IN (SELECT seq FROM messages WHERE queue = ? LIMIT ?)"
SWEEP_GROUPS = "DELETE FROM groups WHERE id IN (SELECT id FROM groups WHERE queue = ? LIMIT ?)"
DROP_GARBAGE = "DELETE FROM garbage WHERE queue = ?"
OLDEST = "SELECT seq, queue, grp, streamed, sent_at, visible_at, receives FROM messages ORDER BY seq LIMIT ?"
TICK = "UPDATE clocks SET last = ? WHERE boot = ?"


@cache
def send(count: int) -> str:
    """Return the statement that inserts ``count`` messages, up to ``AT_ONCE``."""
    rows = ", ".join(["(?, ?, ?, 0, 0, 0, ?, ?, ?)"] * count)
    return f"""INSERT INTO messages (seq, queue, visible_at, receives, charges, streamed, sent_at, grp, body)
        VALUES {rows}"""
