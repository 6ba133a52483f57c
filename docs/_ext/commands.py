"""The directive ``.. commands::``: every command of the command line, as its own parser describes it."""

from __future__ import annotations

from argparse import Action, ArgumentParser, _SubParsersAction
from collections.abc import Iterator

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from sqspipes_mp.cli.main import command_line


class Commands(SphinxDirective):
    """Makes a section for each command: its usage, its options, its own remarks."""

    def run(self) -> list[nodes.Node]:
        parent = nodes.section()
        parent.document = self.state.document
        lines = StringList(list(_lines(command_line())), source="the command line's parser")
        self.state.nested_parse(lines, 0, parent, match_titles=True)
        return list(parent.children)


def _lines(parser: ArgumentParser) -> Iterator[str]:
    for name, one in _commands(parser):
        if _subcommands(one):
            continue
        yield from (name, "-" * len(name), "", one.description or "", "", "::", "")
        yield from (f"    {line}" for line in one.format_usage().removeprefix("usage: ").splitlines())
        yield from ("", f".. program:: {one.prog}", "")
        for action in one._actions:
            if "--help" not in action.option_strings:
                yield from _option(action)
        remarks = (one.epilog or "").partition("exit codes:")[0].strip()
        for remark in remarks.split("\n\n"):
            lines = remark.splitlines()
            yield from (
                ("::", "", *(f"    {line}" for line in lines), "")
                if lines[1:2] and lines[1][:2] == "  "
                else (*lines, "")
            )


def _option(action: Action) -> Iterator[str]:
    value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    names = ", ".join(f"{name}{value}" for name in action.option_strings) or str(action.metavar)
    yield from (f".. option:: {names}", "", f"   {action.help or ''}", "")


def _commands(parser: ArgumentParser) -> Iterator[tuple[str, ArgumentParser]]:
    """Return each command, subcommands after their own, by name."""
    for name, one in _subcommands(parser).items():
        yield f"{parser.prog} {name}", one
        yield from _commands(one)


def _subcommands(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            return dict(action.choices)
    return {}


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
