"""The SQLite broker's tables and statements: text only (any process).

Statements that change messages, or several tables at once, are in ``transactions``.

``queues``    ``keyed_since``: when the first of the user's keys came after the queue was created or emptied.
``messages``  one row per message; ``receives`` numbers its deliveries, so ``seq`` and ``receives`` are its receipt.
              ``sent_at``: the start of its retention: the send, the end of its delay, or the move to a dead-letter
              queue. ``first_sent_at``: the send, where that is another moment (else NULL).
``groups``    one row per FIFO group that has messages: the time from which it may be received, and its oldest message;
              and one per tenant that has messages, see ``transactions``.
``keys``      accepted hop ids. A key lives until ``expires``, or as long as its ``stream`` lives.
``streams``   inputs whose outputs come in several calls. A stream lives until its input is deleted, then until
              ``expires``.
``garbage``   numbers of purged and deleted queues whose rows are still to be removed.
``owners``    the domain of each queue, see ``owners``.
``ends``      the results of fed values, one row each, in JSON; NULL: a message of the value ended without one.
              ``queue`` and ``token`` are the value's key; ``seq`` is a number of the messages' counter; ``kept`` is
              1 for results that every run hands out, 0 for those of a ``run`` that wait for a resumed map.
``clocks``    milliseconds to add to the clock of each boot, see ``session``.

All times are integer milliseconds of the file's clock. ``visible_at``, ``receives`` and ``streamed`` keep their stored
size from the send to the first receive: SQLite then overwrites the row in place and does not write a large body again.
"""

#: Marks the file as ours (``PRAGMA application_id``): ASCII "sqsp".
APPLICATION_ID = 0x73717370
#: Layout of the tables (``PRAGMA user_version``). An older one is brought up to this one, a newer one is refused.
LAYOUT = 2

_CREATE_OWNERS = """CREATE TABLE IF NOT EXISTS owners (
    queue TEXT PRIMARY KEY, domain TEXT NOT NULL, created_at INTEGER NOT NULL
) WITHOUT ROWID"""
#: Makes layout 2 of layout 1, which 0.1 reads and writes. (0.1.1 has made the table of owners in some files.)
FROM_1 = (
    _CREATE_OWNERS,
    "ALTER TABLE queues ADD COLUMN keyed_since INTEGER",
    # Earlier is not possible; 0.1 did not note the time.
    """UPDATE queues SET keyed_since = created_at
        WHERE EXISTS (SELECT 1 FROM keys WHERE queue = queues.id AND stream IS NULL AND expires IS NULL)""",
    """CREATE TABLE ends (
        queue INTEGER NOT NULL, token TEXT NOT NULL, seq INTEGER NOT NULL, kept INTEGER NOT NULL, result TEXT,
        PRIMARY KEY (queue, token, seq)
    ) WITHOUT ROWID""",
    f"PRAGMA user_version = {LAYOUT}",
)
#: Makes layout 2 in an empty file.
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
    *FROM_1,
)

GENERATION = "SELECT generation FROM meta"
QUEUES = "SELECT name, id, fifo, visibility, dead, retention FROM queues"

#: Finds a tenant's messages; made with the first queue that has tenants.
CREATE_TENANT = "CREATE INDEX IF NOT EXISTS tenant ON messages (grp, visible_at, receives) WHERE grp < 0"

# Messages never received that the wall clock has due earlier than the file's. Due times are in their bodies.
_due = "CAST(json_extract(m.body, '$.meta.not_before') * 1000 - ? AS INTEGER)"
EARLIER = f"""SELECT m.seq FROM queues AS q CROSS JOIN messages AS m ON m.queue = q.id AND m.visible_at > ?
    WHERE m.receives = 0 AND m.first_sent_at IS NOT NULL AND json_valid(m.body)
        AND json_type(m.body, '$.meta.not_before') IN ('integer', 'real') AND {_due} < m.visible_at - 1000 LIMIT ?"""
REDATE = f"""UPDATE messages AS m SET visible_at = max(?, {_due}), sent_at = max(?, {_due}) WHERE seq IN ({EARLIER})"""

# The earliest moment at which a queue has a message to receive.
DUE_STANDARD = "SELECT min(visible_at) FROM messages WHERE queue = ?"
DUE_FIFO = "SELECT min(ready_at) FROM groups WHERE queue = ?"

# Queues.
BODIES = "SELECT body, seq, failure FROM messages WHERE queue = ?"
#: Visible, hidden and in flight in one statement: two would both miss a message that is released between them.
DEPTH = """SELECT (SELECT count(*) FROM messages WHERE queue = ? AND visible_at <= ?), count(*),
    coalesce(sum(receives > 0), 0) FROM messages WHERE queue = ? AND visible_at > ?"""

# Owners of queues; each statement is a transaction of its own.
_owned = "o.queue = q.name AND o.created_at = q.created_at"
OWNERS = f"SELECT q.name, o.domain FROM queues AS q JOIN owners AS o ON {_owned}"
#: The first writer becomes the owner; the owner of an earlier queue of the same name is replaced.
OWN = f"""INSERT OR REPLACE INTO owners (queue, domain, created_at) SELECT q.name, ?, q.created_at FROM queues AS q
    WHERE q.name = ? AND NOT EXISTS (SELECT 1 FROM owners AS o WHERE {_owned})"""
DISOWN = f"DELETE FROM owners AS o WHERE NOT EXISTS (SELECT 1 FROM queues AS q WHERE {_owned})"
COUNT = "SELECT count(*) FROM messages WHERE queue = ?"

#: Keys of the user's: without ``stream`` and ``expires``, they live until their queue is purged.
_keyed = "queue = ? AND stream IS NULL AND expires IS NULL"
KEYED = f"SELECT 1 FROM keys WHERE {_keyed} AND hop = ?"
KEYS = f"SELECT count(*) FROM keys WHERE {_keyed}"
KEYED_SINCE = "SELECT keyed_since FROM queues WHERE id = ?"

# Ends of values.
NEXT_SEQ = "SELECT next_seq FROM meta"
ENDED = "SELECT seq, result FROM ends WHERE queue = ? AND token = ? AND kept = ? ORDER BY seq"
RESULTS = """SELECT seq, result FROM ends WHERE queue = ? AND token = ? AND kept = ? AND seq > ? AND seq < ?
    AND result IS NOT NULL ORDER BY seq LIMIT ?"""
FORGET_RESULTS = "DELETE FROM ends WHERE queue = ? AND token = ? AND seq <= ? AND NOT kept"
UNENDED = f"""SELECT hop FROM keys AS k WHERE {_keyed}
    AND NOT EXISTS (SELECT 1 FROM ends AS e WHERE e.queue = k.queue AND e.token = k.hop AND e.kept)"""

# Rows of purged and deleted queues; each statement is a transaction of its own.
GARBAGE = "SELECT queue FROM garbage LIMIT 1"
SWEEP_MESSAGES = "DELETE FROM messages WHERE seq IN (SELECT seq FROM messages WHERE queue = ? LIMIT ?)"
SWEEP_GROUPS = "DELETE FROM groups WHERE id IN (SELECT id FROM groups WHERE queue = ? LIMIT ?)"
QUEUE_KEYS = "SELECT queue, hop FROM keys WHERE queue = ? LIMIT ?"
#: Tokens are scattered, so a run of them is found by the index; one value's results are removed together.
SWEEP_ENDS = """DELETE FROM ends WHERE queue = ? AND token <= coalesce(
    (SELECT token FROM ends WHERE queue = ? ORDER BY token, seq LIMIT 1 OFFSET ?), 'g')"""
DROP_GARBAGE = "DELETE FROM garbage WHERE queue = ?"

ADD_CLOCK = """INSERT OR IGNORE INTO clocks (boot, shift, last)
    SELECT ?, max(?, coalesce(max(last), 0)) - ?, max(?, coalesce(max(last), 0)) FROM clocks"""
TICK = "UPDATE clocks SET last = ? WHERE boot = ?"
