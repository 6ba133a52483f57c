"""``sqspipes-mp dead``: list, show, redrive and discard dead letters (the command line's process)."""

from __future__ import annotations

import base64
import json
import shutil
from argparse import Namespace
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict
from datetime import datetime
from textwrap import indent

from sqspipes_mp.caller.dead_letters import DeadLetter, Moved, discard, redrive, resolve_ids, short_ids, survey
from sqspipes_mp.cli.console import Console, table
from sqspipes_mp.cli.exits import Exit, Refused
from sqspipes_mp.cli.queues import agreed, engine_of, warn_of_others
from sqspipes_mp.engine import Engine, every_queue
from sqspipes_mp.messages.plain import lines, one_line

#: Columns where there is no terminal, and least columns of an error on a narrow one.
_WIDTH, _LEAST = 200, 20


def dead_list(flags: Namespace, _console: Console) -> Exit:
    """Show a line for each dead letter."""
    engine = engine_of(flags)
    found = survey(every_queue(engine), engine.broker, flags.stage)
    warn_of_others(engine)
    if flags.json:
        print(json.dumps([_plain(letter) for letter in found.letters], indent=2))
        return Exit.DONE
    if found.letters:
        print(f"{_place(engine)}\n\n{_table(found.letters)}")
    else:
        print(f"{_place(engine)}: no dead letters{' to be seen' if found.hidden else ''}.")
    _tell_hidden(found.hidden)
    return Exit.DONE


def dead_show(flags: Namespace, _console: Console) -> Exit:
    """Show every field of one dead letter. Raises ``ConfigError`` for an id that fits none or several."""
    engine = engine_of(flags)
    found = survey(every_queue(engine), engine.broker)
    ids = resolve_ids([letter.id for letter in found.letters], [flags.id], found.hidden)
    # SQS may have delivered, and so dead-lettered, one message twice.
    copies = [letter for letter in found.letters if letter.id in ids]
    if flags.json:
        print("\n".join(json.dumps(_plain(letter), indent=2) for letter in copies))
    else:
        print("\n\n".join(_whole(letter) for letter in copies))
    return Exit.DONE


def dead_redrive(flags: Namespace, _console: Console) -> Exit:
    """Put dead letters back into the queues they failed in."""
    engine, ids = engine_of(flags), _ids(flags)
    moved = redrive(every_queue(engine), engine.broker, ids)
    queues = Counter(letter.queue for letter in moved.letters)
    counts = ", ".join(f"{queue} {count:,}" for queue, count in queues.items())
    return _done(engine, moved, f"Put back {len(moved.letters):,}: {counts}.", "redrive")


def dead_discard(flags: Namespace, _console: Console) -> Exit:
    """Delete dead letters, after asking."""
    engine, ids = engine_of(flags), _ids(flags)
    if not flags.yes:
        found = survey(every_queue(engine), engine.broker)
        known = [letter.id for letter in found.letters]
        # Only the letters asked about go, none that have come meanwhile.
        ids = set(known) if ids is None else resolve_ids(known, ids, found.hidden)
        if ids:
            chosen = [letter for letter in found.letters if letter.id in ids]
            print(f"These dead letters will be deleted; {_place(engine)}:\n\n{_table(chosen)}\n", flush=True)
            if not agreed(flags, "Delete them all?"):
                return Exit.FAILED
    moved = discard(every_queue(engine), engine.broker, ids)
    return _done(engine, moved, f"Deleted {len(moved.letters):,}.", "discard")


def _ids(flags: Namespace) -> Collection[str] | None:
    if bool(flags.ids) == flags.all:
        raise Refused(f"give IDs as in dead list, or --all{', not both' if flags.all else ''}")
    return None if flags.all else flags.ids


def _done(engine: Engine, moved: Moved, text: str, verb: str) -> Exit:
    if moved.letters:
        print(text)
    elif not moved.missed:
        print(f"{_place(engine)}: no dead letters{' to be seen' if moved.hidden else ''}, nothing to {verb}.")
    if moved.missed:
        print(f"{len(moved.missed):,} could not be taken out: another command had them. See dead list.")
    _tell_hidden(moved.hidden)
    return Exit.FAILED if moved.missed else Exit.DONE


def _place(engine: Engine) -> str:
    return f"{engine.domain} on {engine.broker.describe()}"


def _tell_hidden(count: int) -> None:
    if count:
        print(
            f"\nThe queues count about {count:,} more, which cannot be seen now: another command has them (for a minute"
            "\nif it was killed), they wait behind others of their FIFO group, or SQS's count is late."
        )


def _table(letters: Sequence[DeadLetter]) -> str:
    ids = short_ids([letter.id for letter in letters])
    rows = [
        (_line(ids[letter.id]), letter.stage, _when(letter.failure.failed_at), letter.failure.attempts or "?")
        for letter in letters
    ]
    rows_shown = table(("id", "stage", "failed", "attempts"), rows, left=3).splitlines()
    room = max(_LEAST, shutil.get_terminal_size((_WIDTH, 24)).columns - len(rows_shown[0]) - 2)
    errors = ["error", *(_cut(_error(letter), room) for letter in letters)]
    return "\n".join(f"{line}  {error}" for line, error in zip(rows_shown, errors, strict=True))


def _whole(letter: DeadLetter) -> str:
    failure = letter.failure
    worker = f"pid {failure.pid} on {failure.host or 'an unknown host'}" if failure.pid is not None else failure.host
    fields = (
        ("id", letter.id),
        ("stage", letter.stage),
        ("queue", letter.queue),
        ("error", _error(letter)),
        ("attempts", str(failure.attempts or "")),
        ("signal", failure.signal or ""),
        ("first seen", _when(failure.first_seen, "")),
        ("failed", _when(failure.failed_at, "")),
        ("worker", worker),
    )
    # An error of several lines stands in its traceback; without one, below.
    text = failure.text if "\n" in failure.text.strip() and not failure.traceback else ""
    blocks = (
        ("text", text),
        ("traceback", failure.traceback),
        ("stack", failure.stack),
        ("attributes", "\n".join(f"{name}: {_told(value)}" for name, value in letter.attributes.items())),
    )
    told = [f"{name:<10}  {_line(value)}" for name, value in fields if value]
    # The body comes last: what another block says cannot pass for it.
    told += [f"\n{name}:\n{indent(lines(value.rstrip()), '  ')}" for name, value in blocks if value]
    return "\n".join([*told, f"\nbody:\n{lines(_pretty(letter.body).rstrip())}"])


def _plain(letter: DeadLetter) -> dict[str, object]:
    value = letter.value
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        value = None  # NaN, say, or a value of decode=; the body stands beside it.
    return {
        "id": letter.id,
        "stage": letter.stage,
        "queue": letter.queue,
        "failure": {name: _finite(told) for name, told in asdict(letter.failure).items()},
        "body": letter.body,
        "value": value,
        "attributes": {name: _told(told) for name, told in letter.attributes.items()},
    }


def _told(value: str | bytes) -> str:
    """Return an attribute's value as text: Base64 where it is bytes, as SQS shows it."""
    return base64.b64encode(value).decode("ascii") if isinstance(value, bytes) else value


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _error(letter: DeadLetter) -> str:
    failure = letter.failure
    return " ".join(f"{failure.error}: {failure.text}".split()).removesuffix(":")


def _when(seconds: float | None, otherwise: str = "?") -> str:
    if not seconds:
        return otherwise
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    except (ValueError, OverflowError, OSError):
        return str(seconds)


def _pretty(body: str) -> str:
    try:
        return json.dumps(json.loads(body), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return body


def _cut(text: str, room: int) -> str:
    text = _line(text)
    return text if len(text) <= room else f"{text[: room - 3]}..."


def _line(text: str) -> str:
    return one_line(text, len(text))
