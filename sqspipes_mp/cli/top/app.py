"""``sqspipes-mp top``, live, on Textual (the command line's process).

The event loop draws. Threads look at the engine and send orders, since a supervisor that stands still answers nobody.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from rich.console import Group
from rich.table import Table
from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.coordinate import Coordinate
from textual.widgets import DataTable, Static

from sqspipes_mp.cli.top.columns import (
    STAGE_LEGEND,
    STAGES,
    WORKER_LEGEND,
    WORKERS,
    Column,
    Fit,
    Placed,
    in_order,
    oldest,
)
from sqspipes_mp.cli.top.plain import head_lines
from sqspipes_mp.cli.top.screens import LongText, Question
from sqspipes_mp.cli.top.stack_text import parted
from sqspipes_mp.cli.top.watch import Seen, ServedWatch, Watch
from sqspipes_mp.ipc.running.asking import ask
from sqspipes_mp.ipc.running.folders import Unanswered
from sqspipes_mp.ipc.running.notes import sentence, worker_name
from sqspipes_mp.ipc.running.outcomes import SHOWN_ID, outcome
from sqspipes_mp.ipc.running.units import counted, short_time
from sqspipes_mp.messages.plain import lines, one_line

T = TypeVar("T")
Values = Mapping[str, Any]

#: Seconds between two looks.
_REFRESH = 1.0
#: Seconds after an order until every look shows it.
_SETTLED = 0.6
#: Seconds for which the outcome of an order is shown.
_TOLD_FOR = 15.0
#: Notes shown at once, and characters of a sentence.
_NOTES, _MOST = 4, 1000
#: Lines of a terminal below which the notes are left out.
_LOW = 14
_TONES = {"": "", "good": "green", "warn": "yellow", "bad": "bold red", "dim": "dim"}
_HELP = (
    ("up down, tab", "choose a stage or a worker; the last line tells which one is chosen"),
    ("s", "where the chosen worker is, or all of the chosen stage"),
    ("p", "pause the chosen stage, or the chosen worker's: calls end, none begins; once more: it goes on"),
    ("+ -", "one worker of that stage more, or fewer; several presses add up"),
    ("c", "cancel the oldest call of the chosen worker: it is killed, the message dead-lettered (asks)"),
    ("S", "stop the engine, as SIGTERM does (asks)"),
    ("q", "leave; the engine goes on"),
)


class Rows(DataTable[Text]):
    """A table that follows its rows by their names, and hands the cursor on at its ends."""

    def __init__(self, columns: Sequence[Column], name_of: Callable[[Values], str], ident: str) -> None:
        super().__init__(id=ident, cursor_type="row", cell_padding=0, zebra_stripes=False)
        self._fit, self._name_of = Fit(columns), name_of
        self._placed: list[Placed] = []
        self._names: list[str] = []
        self._shown: dict[str, list[Text]] = {}
        #: The rows as they are shown, by their names.
        self.values: dict[str, Values] = {}
        #: The tables that the cursor goes on to.
        self.above: Rows | None = None
        self.below: Rows | None = None

    @property
    def chosen(self) -> Values | None:
        """The row under the cursor."""
        return self.values[self._names[self.cursor_row]] if 0 <= self.cursor_row < len(self._names) else None

    def show(self, rows: Sequence[Values], width: int) -> None:
        """Show rows in ``width`` columns of the terminal; cells that are as before stay untouched."""
        gap = 2 if width >= 100 else 1
        placed = self._fit.place(rows, width, gap)
        names = [self._name_of(row) for row in rows]
        self.values = dict(zip(names, rows, strict=True))
        shown = {
            name: [_drawn(each, row, gap * (each is not placed[-1])) for each in placed]
            for name, row in self.values.items()
        }
        if placed == self._placed and names == self._names:
            for row, name in enumerate(names):
                for column, (old, new) in enumerate(zip(self._shown[name], shown[name], strict=True)):
                    if old != new or old.style != new.style:
                        self.update_cell_at(Coordinate(row, column), new)
        else:
            self._rebuild(placed, names, shown, gap)
        self._shown = shown

    def _rebuild(self, placed: list[Placed], names: list[str], shown: dict[str, list[Text]], gap: int) -> None:
        chosen = self._names[self.cursor_row] if 0 < self.cursor_row < len(self._names) else None
        scrolled = self.scroll_y
        self.clear(columns=placed != self._placed)
        if placed != self._placed:
            for each in placed:
                space = gap * (each is not placed[-1])
                head = Text(each.pad(each.column.head) + " " * space, style="dim")
                self.add_column(head, width=each.width + space, key=each.column.head)
        for name in names:
            self.add_row(*shown[name], key=name)
        self._placed, self._names = placed, names
        if chosen in names:
            self.move_cursor(row=names.index(chosen), animate=False, scroll=False)
        self.scroll_to(y=scrolled, animate=False)

    def action_cursor_down(self) -> None:
        if self.below is not None and self.cursor_row >= len(self._names) - 1:
            self.below.enter(0)
        else:
            super().action_cursor_down()

    def action_cursor_up(self) -> None:
        if self.above is not None and self.cursor_row <= 0:
            self.above.enter(len(self.above.values) - 1)
        else:
            super().action_cursor_up()

    def on_focus(self) -> None:
        self.cursor_foreground_priority = "css"

    def on_blur(self) -> None:
        # The row that is not the cursor any more keeps its cells' tones.
        self.cursor_foreground_priority = "renderable"

    def enter(self, row: int) -> None:
        """Take the cursor."""
        self.focus()
        self.move_cursor(row=row, animate=False)


class Top(App[None]):
    """The live view."""

    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c", "quit", priority=False),
        Binding("ctrl+z", "suspend_process"),
        Binding("s", "stack"),
        Binding("p", "pause"),
        Binding("plus,equals_sign", "scale(1)"),
        Binding("minus", "scale(-1)"),
        Binding("c", "cancel"),
        Binding("S", "stop"),
        Binding("question_mark,h", "help"),
    ]
    CSS = """
    Screen { overflow: hidden; }
    #head { height: auto; max-height: 4; }
    #head, #keys { text-wrap: nowrap; text-overflow: ellipsis; }
    #stages { height: auto; max-height: 40%; margin-top: 1; }
    #workers { height: 1fr; min-height: 3; margin-top: 1; }
    #notes { height: auto; max-height: 40%; margin-top: 1; }
    #answer { height: auto; max-height: 3; }
    #keys { height: auto; max-height: 2; dock: bottom; }
    Rows { scrollbar-size-vertical: 1; scrollbar-size-horizontal: 0; overflow-x: hidden; }
    Rows > .datatable--header { background: ansi_default; color: ansi_default; text-style: bold; }
    """

    def __init__(self, watch: Watch | ServedWatch) -> None:
        super().__init__(ansi_color=True)
        self._watch = watch
        self._seen = Seen(None)
        #: The numbers of workers that were asked for and are not in the statistics yet, by stages.
        self._wanted: dict[str, int] = {}
        #: When the outcome that is shown was told, monotonic seconds.
        self._told_at = 0.0

    def compose(self) -> ComposeResult:
        yield Static(id="head")
        yield Rows(STAGES, lambda stage: stage["name"], "stages")
        yield Rows(WORKERS, worker_name, "workers")
        yield Static(id="notes")
        yield Static(id="answer")
        yield Static(id="keys")

    def on_mount(self) -> None:
        self.theme = "ansi-dark"
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.exit)
        stages, workers = self._rows("#stages"), self._rows("#workers")
        stages.below, workers.above = workers, stages
        workers.focus()
        self.run_worker(self._look_again_and_again())

    def on_resize(self, _event: events.Resize) -> None:
        self._draw()

    async def _look_again_and_again(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(_REFRESH)

    async def _look(self) -> None:
        self._seen = await _in_thread(self._watch.look)
        self._draw()

    # -- drawing ------------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        seen, state = self._seen, self._seen.state
        parts: list[tuple[str, str]] = []
        if state is not None:
            run, process, health = head_lines(state)
            parts += [(run, "bold"), (process, ""), (health, _TONES[state["verdict"]["tone"]])]
        if seen.ended and state is not None:
            parts[1:] = [(f"pid {state['engine']['pid']} HAS ENDED; these are its last numbers", _TONES["bad"])]
        if seen.why:
            parts.append((one_line(seen.why), "yellow"))
        if not parts:
            parts = [("looking for an engine", "dim")]
        self._put("#head", Text("\n").join(Text(*part) for part in parts))
        # A column is the scrollbar's.
        width = self.size.width - 1
        self._rows("#stages").show(state["stages"] if state is not None else (), width)
        self._rows("#workers").show(in_order(state["workers"]) if state is not None else (), width)
        self._draw_notes()
        if time.monotonic() - self._told_at > _TOLD_FOR:
            self._put("#answer", Text())
        self._draw_keys()

    def _draw_notes(self) -> None:
        state = self._seen.state
        told = []
        for note in state["notes"] if state is not None else ():
            text = sentence(note, keys=True)
            if note["on_row"] and not self._is_chosen(note):
                row = note["stage"] if note["worker"] is None else worker_name(note)
                text = sentence({**note, "keys": f"choose {row}, then {note['keys']}"}, keys=True)
            told.append((_TONES[note["tone"]], one_line(text, _MOST)))
        more = [("dim", f"and {len(told) - _NOTES} more")] if len(told) > _NOTES else []
        self.query_one("#notes").display = bool(told) and self.size.height >= _LOW
        self._put("#notes", Text("\n").join(Text(text, tone) for tone, text in told[:_NOTES] + more))

    def _draw_keys(self) -> None:
        """Show each key beside the row it is about; in two lines where one is too narrow."""
        stage, worker = self._stage, self._worker
        gap = "  " if self.size.width >= 80 else " "
        if stage is None or self._seen.ended:
            self._put("#keys", Text(f"? help{gap}q quit", style="dim"))
            return
        rest = gap.join(("S stop", "? help", "q quit"))
        does = "p resume" if stage["paused"] else "p pause"
        if worker is None:
            parts = [("chosen: ", stage["name"], gap.join(("s stacks", does, "+- workers")))]
        else:
            parts = [
                ("chosen: ", worker_name(worker), gap.join(("s stack", "c cancel"))),
                ("its stage ", stage["name"], gap.join((does, "+- workers"))),
            ]
        texts = [
            Text.assemble((before, "dim"), (one_line(name), "bold"), (f" {keys}", "dim"))
            for before, name, keys in parts
        ]
        line = Text("   ").join([*texts, Text(rest, style="dim")])
        if line.cell_len > self.size.width:
            line = Text("\n").join([texts[0], Text("   ").join([*texts[1:], Text(rest, style="dim")])])
        self._put("#keys", line)

    def _put(self, name: str, text: Text) -> None:
        self.screen_stack[0].query_one(name, Static).update(text)

    def _rows(self, name: str) -> Rows:
        return self.screen_stack[0].query_one(name, Rows)

    def _answer(self, text: str, tone: str = "") -> None:
        self._told_at = time.monotonic()
        self._put("#answer", Text(one_line(text, 500), _TONES[tone]))

    # -- choosing -----------------------------------------------------------------------------------------------

    @property
    def _worker(self) -> Values | None:
        """The chosen worker; None where a stage is chosen."""
        return None if self._rows("#stages").has_focus else self._rows("#workers").chosen

    @property
    def _stage(self) -> Values | None:
        """The chosen stage, or the chosen worker's."""
        worker, stages = self._worker, self._rows("#stages")
        return stages.chosen if worker is None else stages.values.get(worker["stage"])

    def _is_chosen(self, note: Values) -> bool:
        """Tell whether the keys of a note's cure would be for its own row now."""
        stage, worker = self._stage, self._worker
        if stage is None or stage["name"] != note["stage"]:
            return False
        return note["worker"] is None or (worker is not None and worker["worker"] == note["worker"])

    def on_descendant_focus(self) -> None:
        self._draw_chosen()

    def on_data_table_row_highlighted(self) -> None:
        self._draw_chosen()

    def _draw_chosen(self) -> None:
        self._draw_notes()
        self._draw_keys()

    # -- orders -------------------------------------------------------------------------------------------------

    async def _ask(self, told: str, order: Mapping[str, object]) -> dict[str, Any] | None:
        """Send an order, and tell its end; None: refused, or no answer."""
        engine = self._watch.engine
        if engine is None:
            self._answer("no engine runs", "bad")
            return None
        self._answer(f"{told} …", "dim")
        try:
            answer = await _in_thread(lambda: ask(engine, order))
        except Unanswered as error:
            self._answer(f"{told}: {error}", "bad")
            return None
        self._answer(outcome(order, answer))
        return answer

    def action_pause(self) -> None:
        if (stage := self._stage) is not None:
            do = "resume" if stage["paused"] else "pause"
            self.run_worker(self._ask(f"{do} {stage['name']}", {"do": do, "stage": stage["name"]}))

    def action_scale(self, more: int) -> None:
        stage = self._stage
        if stage is None:
            return
        name = stage["name"]
        begun = name in self._wanted
        # The number on the screen is as old as the last look.
        self._wanted[name] = max(0, (self._wanted[name] if begun else stage["wanted"]) + more)
        if not begun:
            self.run_worker(self._scale(name))

    async def _scale(self, name: str) -> None:
        """Ask for the wanted number, one order after another, until the newest one is carried out."""
        asked: int | None = None
        while asked != (wanted := self._wanted[name]):
            asked = wanted
            order = {"do": "scale", "stage": name, "workers": wanted}
            if await self._ask(f"scale {name} to {wanted}", order) is None:
                break
            # The next press counts from the statistics again, so they must show it; a server's are half a second old.
            await asyncio.sleep(_SETTLED)
            await self._look()
        del self._wanted[name]

    def action_cancel(self) -> None:
        worker = self._worker
        call = oldest(worker) if worker is not None else None
        if worker is None or call is None:
            self._answer("choose a worker with a running call first", "warn")
            return
        ident = call["id"]
        question = Question(
            f"Cancel the call of {worker_name(worker)}, which runs for {short_time(call['age'] or 0.0)}?\n"
            f"Message {one_line(ident[:SHOWN_ID])}",
            "Its worker is killed and replaced; the message becomes a dead letter. No other message loses an attempt.",
            yes="kill the worker",
            no="keep it running",
        )

        def on_answer(yes: bool | None) -> None:
            if yes:
                self.run_worker(self._ask(f"cancel {one_line(ident[:SHOWN_ID])}", {"do": "cancel", "call": ident}))

        self.push_screen(question, on_answer)

    def action_stop(self) -> None:
        engine = self._watch.engine
        if engine is None:
            self._answer("no engine runs", "bad")
            return
        question = Question(
            f"Stop {one_line(engine.name)}?",
            "As SIGTERM does: running calls end first, what is held goes back to its queue.",
            yes="stop the engine",
            no="let it run",
        )

        def on_answer(yes: bool | None) -> None:
            if yes:
                self.run_worker(self._ask("stop", {"do": "stop"}))

        self.push_screen(question, on_answer)

    async def action_stack(self) -> None:
        self.run_worker(self._show_stacks())

    async def _show_stacks(self) -> None:
        stage, worker = self._stage, self._worker
        if stage is None:
            return
        number = None if worker is None else worker["worker"]
        name = stage["name"] if worker is None else worker_name(worker)
        # Never by a signal, which may make a sleeping call return early.
        answer = await self._ask(f"stack of {name}", {"do": "stack", "stage": stage["name"], "worker": number})
        if answer is None:
            return
        text = Text()
        for each in answer["stacks"]:
            text.append(f"{worker_name(each)} (pid {each['pid']})\n", "bold")
            shown, others = parted(each["stack"])
            text.append(f"{lines(shown)}\n")
            if others:
                text.append(
                    f"and {counted(len(others), 'thread')} of the library: {one_line(', '.join(others))}\n", "dim"
                )
            text.append("\n")
        for each in answer["silent"]:
            text.append(f"{worker_name(each)} (pid {each['pid']})\n", "bold")
            text.append(
                "no answer: it gets no CPU, or C code keeps its GIL; a signal asks it all the same:\n"
                f"sqspipes-mp stack --stage {stage['name']} --worker {each['worker']} --signal\n\n",
                "yellow",
            )
        text.rstrip()
        self.push_screen(LongText(text))

    def action_help(self) -> None:
        sections = (
            ("Keys", _HELP), ("Columns of stages", STAGE_LEGEND), ("Columns of workers", WORKER_LEGEND)
        )  # fmt: skip
        parts: list[Text | Table] = []
        for heading, pairs in sections:
            table = Table.grid(padding=(0, 2))
            table.add_column(style="bold", min_width=12, no_wrap=True)
            table.add_column()
            for pair in pairs:
                table.add_row(*pair)
            parts += [Text(heading, "underline"), table, Text()]
        self.push_screen(LongText(Group(*parts[:-1])))


def _drawn(placed: Placed, row: Values, gap: int) -> Text:
    cell = placed.column.cell(row)
    return Text(placed.pad(cell.text) + " " * gap, style=_TONES[cell.tone], no_wrap=True)


async def _in_thread(function: Callable[[], T]) -> T:
    """Return a function's value, made by a thread that the program's end does not wait for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: Exception | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        try:
            outcome: tuple[T | None, Exception | None] = function(), None
        except Exception as error:
            outcome = None, error
        try:
            loop.call_soon_threadsafe(settle, *outcome)
        except RuntimeError:
            # The program has ended meanwhile.
            return

    threading.Thread(target=run, daemon=True).start()
    return await future
