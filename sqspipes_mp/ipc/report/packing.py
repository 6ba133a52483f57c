"""An exception and all it is chained to as bytes (worker and keeper).

Each travels on its own, so that one that cannot does not take the others with it::

    root ── cause ──► node 1          node = its pickle, without traceback and links
      └── context ──► node 2                 + type, message, notes as text
                                             + traceback and links as plain numbers
"""

from itertools import groupby, islice
from types import TracebackType
from typing import Any

from sqspipes_mp.ipc.report.bytes import encode, join
from sqspipes_mp.ipc.report.pickling import Numbers, pickle_alone
from sqspipes_mp.ipc.report.raw import get
from sqspipes_mp.ipc.report.words import MAX_NOTE, cut, frames_of, message_of, notes_of, type_name, walk

#: Bytes of all pickles and links of one report.
MAX_PICKLED = 262_144
#: Exceptions of a chain; entries of one traceback; repetitions of one entry.
MAX_NODES, MAX_FRAMES, MAX_REPEATED = 1_000, 200, 1_000

#: File, function, module.
Code = tuple[str, str, str]


def pack(root: BaseException) -> tuple[bytes | None, list[str]]:
    """Return what ``loading.load`` reads (None: ``root`` cannot travel), and notes for ``root``."""
    numbers = Numbers(root)
    # Numbered by their order; a traceback refers to them.
    codes: dict[Code, int] = {}
    nodes: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    left, paid = MAX_PICKLED, 0
    # It grows while it is walked: the nearest first.
    for exc in numbers.met:
        node, blob = _node(exc, numbers, codes, left)
        cost = len(encode(node)) + len(encode(list(islice(codes, paid, None))))
        if cost + len(blob) > left:
            node["size"], blob = 0, b""
        if not nodes and not blob:
            return None, node["notes"]
        if cost > left or len(nodes) == MAX_NODES:
            rest = len(numbers.met) - len(nodes)
            nodes[0]["notes"].append(f"{rest} or more exceptions of its chain did not fit into the report")
            break
        left -= cost + len(blob)
        paid = len(codes)
        nodes.append(node)
        blobs.append(blob)
    return join({"codes": list(islice(codes, paid)), "nodes": nodes}, *blobs), nodes[0]["notes"]


def _node(exc: BaseException, numbers: Numbers, codes: dict[Code, int], room: int) -> tuple[dict[str, Any], bytes]:
    blob, dropped = pickle_alone(exc, numbers, room)
    frames, lost = _frames(frames_of(exc), codes)
    notes = notes_of(exc) + dropped
    if lost:
        notes.append(f"{lost} frames in the middle of its traceback were left out")
    node = {
        "type": type_name(type(exc)),
        "message": cut(message_of(exc), MAX_NOTE),
        "notes": notes,
        "cause": _link(get(exc, "__cause__"), numbers),
        "context": _link(get(exc, "__context__"), numbers),
        "suppress": bool(get(exc, "__suppress_context__")),
        "frames": frames,
        "size": len(blob),
    }
    return node, blob


def _link(exc: BaseException | None, numbers: Numbers) -> int | None:
    return None if exc is None else numbers.of(exc)


def _frames(tb: TracebackType | None, codes: dict[Code, int]) -> tuple[list[tuple[int, int, int]], int]:
    """Return (number of the code, line, repetitions) outermost first, and how many frames were left out."""
    plain: list[tuple[int, int]] = []
    for frame, line in walk(tb):
        module = frame.f_globals.get("__name__")
        key = (frame.f_code.co_filename, frame.f_code.co_name, module if isinstance(module, str) else "?")
        plain.append((codes.setdefault(key, len(codes)), line))
    # A RecursionError is one line a thousand times over.
    runs = [(code, line, sum(1 for _ in run)) for (code, line), run in groupby(plain)]
    if len(runs) > MAX_FRAMES:
        runs = runs[: MAX_FRAMES // 2] + runs[-MAX_FRAMES // 2 :]
    kept = [(code, line, min(count, MAX_REPEATED)) for code, line, count in runs]
    return kept, len(plain) - sum(count for _, _, count in kept)
