"""Whether an engine lives and is ready: one verdict for ``health``, ``/livez`` and ``/readyz`` (any process). Light.

The broker's absence, long calls and C code that keeps the GIL say nothing about a life: only the beats of supervisor
and keeper do.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqspipes_mp.ipc.running import fixed

#: Seconds between two beats of the supervisor at most, and its silence from which an engine does not live.
BEAT_EVERY, SILENCE = 5.0, 30.0
#: Seconds for which a stage without a word from the broker is ready still.
CONTACT = 60


class Verdict:
    """The answer, with the reason in one line."""

    def __init__(self, *, live: bool, ready: bool, why: str) -> None:
        self.live = live
        #: Whether it is ready; one that does not live is not.
        self.ready = ready
        self.why = why


def verdict(words: Sequence[int], now: int, stages: Sequence[str] = ()) -> Verdict:
    """Judge an engine by the first words of its statistics (``fixed``).

    Args:
        words: ``fixed.WORDS`` of them, of a memory of any version.
        now: monotonic nanoseconds.
        stages: the names of the pipeline's stages.
    """
    silent = (now - words[fixed.SUPERVISOR_BEAT]) / 1e9
    if silent > SILENCE:
        return Verdict(live=False, ready=False, why=f"the supervisor has not moved for {silent:.0f} s")
    limit = words[fixed.KEEPER_LIMIT]
    if limit and now - words[fixed.KEEPER_BEAT] > limit:
        silent = (now - words[fixed.KEEPER_BEAT]) / 1e9
        return Verdict(live=False, ready=False, why=f"the keeper has not moved for {silent:.0f} s")
    state = words[fixed.READINESS]
    if state == fixed.READY:
        return Verdict(live=True, ready=True, why="every stage is ready")
    index, reason = state >> 8, state & 0xFF
    name = stages[index] if index < len(stages) else str(index)
    text = fixed.NOT_READY.get(reason, "it is starting")
    return Verdict(live=True, ready=False, why=text.format(stage=name, seconds=CONTACT))
