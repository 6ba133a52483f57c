"""``sqspipes-mp dead``: list, show, redrive and discard dead letters (the command line's process)."""

from __future__ import annotations

import base64
import json
import shutil
import traceback
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from importlib import import_module
from textwrap import indent

from sqspipes_mp.caller.dead_letters import DeadLetter, Moved, Survey, discard, redrive, short_ids, survey
from sqspipes_mp.caller.replay import replay
from sqspipes_mp.cli.console import Console, table
from sqspipes_mp.cli.dead_choice import choice_of, ids_of
from sqspipes_mp.cli.exits import Exit, Refused
from sqspipes_mp.cli.queues import agreed, engine_of, warn_of_others
from sqspipes_mp.engine import Engine, every_queue, plan_run
from sqspipes_mp.messages.plain import lines, one_line
from sqspipes_mp.messages.told import value_text

#: Columns where there is no terminal, and least columns of an error on a narrow one.
_WIDTH, _LEAST = 200, 20
#: Columns from which a table has room for dates, and most characters of a value that is told.
_WIDE, _VALUE = 80, 200


def dead_list(flags: Namespace, _console: Console) -> Exit:
    """Show a line for each dead letter."""
    engine = engine_of(flags)
    found = survey(every_queue(engine), engine.broker, flags.stage, chosen=choice_of(flags, engine.pipeline))
    warn_of_others(engine)
    if flags.json:
        print(json.dumps([_plain(letter) for letter in found.letters], indent=2))
        return Exit.DONE
    if found.letters:
        print(f"{_place(engine)}\n\n{_table(found.letters)}")
    else:
        print(f"{_place(engine)}: {_none(found)}.")
    _tell_hidden(found.hidden)
    return Exit.DONE


def dead_show(flags: Namespace, _console: Console) -> Exit:
    """Show every field of one dead letter. Raises ``ConfigError`` for an id that fits none or several."""
    engine = engine_of(flags)
    # SQS may have delivered, and so dead-lettered, one message twice.
    copies = survey(every_queue(engine), engine.broker, ids=[flags.id]).letters
    if flags.json:
        print("\n".join(json.dumps(_plain(letter), indent=2) for letter in copies))
    else:
        print("\n\n".join(_whole(letter) for letter in copies))
    return Exit.DONE


def dead_redrive(flags: Namespace, _console: Console) -> Exit:
    """Put dead letters back into the queues they failed in."""
    engine = engine_of(flags)
    chosen = choice_of(flags, engine.pipeline)
    moved = redrive(every_queue(engine), engine.broker, ids_of(flags, chosen), chosen)
    queues = Counter(letter.queue for letter in moved.letters)
    counts = ", ".join(f"{queue} {count:,}" for queue, count in queues.items())
    return _done(engine, moved, f"Put back {len(moved.letters):,}: {counts}.", "redrive")


def dead_discard(flags: Namespace, _console: Console) -> Exit:
    """Delete dead letters, after asking."""
    engine = engine_of(flags)
    chosen = choice_of(flags, engine.pipeline)
    ids = ids_of(flags, chosen)
    if not flags.yes:
        letters = survey(every_queue(engine), engine.broker, flags.stage, chosen=chosen, ids=ids or ()).letters
        # Only the letters asked about go, none that have come meanwhile.
        ids = {letter.id for letter in letters}
        if ids:
            print(f"These dead letters will be deleted; {_place(engine)}:\n\n{_table(letters)}\n", flush=True)
            if not agreed(flags, "Delete them all?"):
                return Exit.FAILED
    moved = discard(every_queue(engine), engine.broker, ids, chosen)
    return _done(engine, moved, f"Deleted {len(moved.letters):,}.", "discard")


def dead_replay(flags: Namespace, _console: Console) -> Exit:
    """Call a stage's function here with a dead letter's value. Raises ``Refused`` where the function raises."""
    engine = engine_of(flags)
    letter = survey(every_queue(engine), engine.broker, ids=[flags.id]).letters[0]
    plan = plan_run(engine, letter.stage)
    print(f"{letter.stage} is called here with {value_text(letter.value, _VALUE)}; no queue is touched.\n", flush=True)
    try:
        outputs = replay(plan, letter)
    except Exception as error:
        if flags.pdb:
            traceback.print_exception(error)
            import_module("pdb").post_mortem(error.__traceback__)
        raise Refused(f"{letter.stage} failed again. Nothing has changed", Exit.FAILED) from error
    print(f"{letter.stage} returned {', '.join(value_text(output, _VALUE) for output in outputs) or 'nothing'}.")
    print(f"The dead letter is where it was; to have it done: dead redrive {flags.target} {flags.id}")
    return Exit.DONE


def _done(engine: Engine, moved: Moved, text: str, verb: str) -> Exit:
    if moved.letters:
        print(text)
    elif not moved.missed:
        print(f"{_place(engine)}: {_none(moved)}, nothing to {verb}.")
    if moved.missed:
        print(f"{len(moved.missed):,} could not be taken out: another command had them. See dead list.")
    _tell_hidden(moved.hidden)
    return Exit.FAILED if moved.missed else Exit.DONE


def _none(found: Survey | Moved) -> str:
    """Return that no letter was chosen, and of how many."""
    if found.seen:
        return f"none of {found.seen:,} dead letters fits" if found.seen > 1 else "the only dead letter does not fit"
    return f"no dead letters{' to be seen' if found.hidden else ''}"


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
    width = shutil.get_terminal_size((_WIDTH, 24)).columns
    wide, most = width >= _WIDE, max(8, min(40, width // 7))
    form = "%Y-%m-%d %H:%M:%S" if wide else "%H:%M:%S"
    columns: dict[str, Callable[[DeadLetter], object]] = {
        "id": lambda letter: _line(ids[letter.id]),
        "stage": lambda letter: letter.stage,
        "key": lambda letter: _cut(letter.key or "", most),
        "value": lambda letter: _cut(value_text(letter.value, most + 1), most),
        "failed": lambda letter: _when(letter.failure.failed_at, form=form),
        "attempts": lambda letter: letter.failure.attempts or "?",
    }
    if not any(letter.key for letter in letters):
        del columns["key"]
    if not wide:
        del columns["attempts"]
    rows = [[cell(letter) for cell in columns.values()] for letter in letters]
    left = len(columns) - wide
    rows_shown = table(list(columns), rows, left=left).splitlines()
    taken = max(map(len, rows_shown))
    rows_shown = [row.ljust(taken) for row in rows_shown]
    room = max(_LEAST, width - taken - 2)
    errors = ["error", *(_cut(_error(letter), room) for letter in letters)]
    return "\n".join(f"{line}  {error}" for line, error in zip(rows_shown, errors, strict=True))


def _whole(letter: DeadLetter) -> str:
    failure = letter.failure
    worker = f"pid {failure.pid} on {failure.host or 'an unknown host'}" if failure.pid is not None else failure.host
    fields = (
        ("id", letter.id),
        ("stage", letter.stage),
        ("key", letter.key or ""),
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
        "key": letter.key,
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


def _when(seconds: float | None, otherwise: str = "?", form: str = "%Y-%m-%d %H:%M:%S %z") -> str:
    if not seconds:
        return otherwise
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime(form)
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
