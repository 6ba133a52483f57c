"""The words at the statistics' beginning that keep their place in every version (any process). Pure, and light.

Each is an aligned word of 8 bytes, little-endian.
"""

from __future__ import annotations

#: ``MAGIC_WORD``.
MAGIC = 0
MAGIC_WORD = int.from_bytes(b"sqspipes", "little")
#: Number of the layout of all that follows these words.
LAYOUT = 1
#: Bytes of the memory.
SIZE = 2
#: Two words.
RUN_ID = 3
#: When the supervisor's loop last turned, monotonic nanoseconds.
SUPERVISOR_BEAT = 5
#: When the keeper last moved, monotonic nanoseconds.
KEEPER_BEAT = 6
#: Nanoseconds that the keeper may stand still; 0: it boots, or is being replaced, and counts as moving.
KEEPER_LIMIT = 7
#: 0: not ready yet. 1: ready. Else stage index << 8 | one of NOT_READY.
READINESS = 8
READY = 1
#: Reasons for which a stage is not ready.
NOT_READY = {
    2: "no worker of stage {stage} is ready",
    3: "no word from the broker for {seconds} s in stage {stage}",
    4: "the run is ending",
}
NO_WORKER, NO_CONTACT, ENDING = NOT_READY
#: Number of these words.
WORDS = 16
