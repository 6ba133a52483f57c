"""What ``top`` lays over its tables: a question, and a long text (the command line's process)."""

from __future__ import annotations

from typing import ClassVar

from rich.console import RenderableType
from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static


class Question(ModalScreen[bool]):
    """A question; nothing but ``y`` is a yes."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "dismiss(True)"),
        Binding("n,escape,enter,q", "dismiss(False)"),
    ]
    CSS = """
    Question { align: center middle; }
    Question > Vertical { width: 90%; max-width: 76; height: auto; max-height: 90%; border: heavy red; padding: 0 1; }
    Question Static { height: auto; }
    """

    def __init__(self, question: str, consequence: str, yes: str, no: str) -> None:
        super().__init__()
        keys = (f"y {yes}   n {no}", "bold")
        self._text = Text.assemble(question, "\n\n", (consequence, "dim"), "\n\n", keys)

    def compose(self) -> ComposeResult:
        yield Vertical(Static(self._text, id="question"))


class LongText(ModalScreen[None]):
    """A text that is read and scrolled."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,enter,s,question_mark", "dismiss(None)")]
    CSS = """
    LongText { align: center middle; }
    LongText > Vertical { width: 96%; height: auto; max-height: 94%; border: round ansi_bright_blue; padding: 0 1; }
    LongText VerticalScroll { height: auto; max-height: 100%; }
    LongText Static { height: auto; }
    """

    def __init__(self, text: RenderableType) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        with Vertical(), VerticalScroll() as scroll:
            scroll.focus()
            yield Static(self._text, id="text")

    def on_mount(self) -> None:
        self.call_after_refresh(self._tell_keys)

    def on_resize(self, _event: events.Resize) -> None:
        self.call_after_refresh(self._tell_keys)

    def _tell_keys(self) -> None:
        scrolls = self.query_one(VerticalScroll).max_scroll_y > 0
        self.query_one(Vertical).border_subtitle = "arrows scroll, q closes" if scrolls else "q closes"
