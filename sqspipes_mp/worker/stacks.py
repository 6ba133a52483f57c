"""Where all threads of this worker are, in words, for a person who asked (worker)."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path

#: Most characters of the answer; a recursion's thousands of frames are cut.
_MOST = 200_000
_DEEPEST = 100
#: The file of the frame that calls the user's function.
_FUNCTION = str(Path(__file__).with_name("run") / "function.py")


def stacks() -> str:
    """Return the stack of each thread, the main thread's first, the innermost frame last.

    No call is disturbed: the asking thread reads the frames while it has the GIL.
    """
    frames = sys._current_frames()
    own, main = threading.get_ident(), threading.main_thread()
    threads = sorted(threading.enumerate(), key=lambda thread: thread is not main)
    parts = []
    for thread in threads:
        frame = frames.get(thread.ident or 0)
        if frame is None or thread.ident == own:
            continue
        lines = traceback.format_list(_without_ours(traceback.extract_stack(frame))[-_DEEPEST:])
        parts.append(f"Thread {thread.name}:\n{''.join(lines)}")
    return "\n".join(parts)[:_MOST]


def _without_ours(frames: list[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Return the frames inside the user's function, where the thread is in it; else all since the worker's begin."""
    for place in range(len(frames) - 1, -1, -1):
        if frames[place].filename == _FUNCTION:
            return frames[place + 1 :] or frames[place:]
    begin = [place for place, frame in enumerate(frames) if frame.name == "worker_main"]
    return frames[begin[0] :] if begin else frames
