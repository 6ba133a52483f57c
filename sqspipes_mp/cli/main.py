"""The command line ``sqspipes-mp``: its commands and flags. ``exits`` picks the exit code (the command line)."""

from __future__ import annotations

import errno
import os
import signal
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

from sqspipes_mp import __version__
from sqspipes_mp.cli.console import NAME, Console, open_streams
from sqspipes_mp.cli.dead import dead_discard, dead_list, dead_redrive, dead_replay, dead_show
from sqspipes_mp.cli.dead_choice import add_choice
from sqspipes_mp.cli.demo import demo
from sqspipes_mp.cli.doctor.command import EPILOG as DOCTOR_EPILOG
from sqspipes_mp.cli.doctor.command import add_flags, doctor
from sqspipes_mp.cli.exits import Exit, Refused, Stopped, child_note, ending_of
from sqspipes_mp.cli.look import ps, stack, stop, top
from sqspipes_mp.cli.queues import delete, purge, status
from sqspipes_mp.cli.run import FORMATS, LEVELS, POLICIES, UNTIL, run
from sqspipes_mp.cli.serve import serve
from sqspipes_mp.cli.steer import cancel, pause, resume, scale

Command = Callable[[Namespace, Console], Exit]

#: Errors of a write to stdout, which names no file.
_OF_STDOUT = frozenset({errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG})

_FOLDER = str(Path(__file__).parent) + os.sep
_PACKAGE = str(Path(__file__).parents[1]) + os.sep

_TARGET = (
    "an Engine, or a function returning one: words:engine or ./words.py:engine for engine in words.py. The file is "
    "imported; commands for running engines (top, stack, stop, scale) take a domain instead"
)
_RUNNING = (
    "a domain, a pid, the MODULE:ENGINE text as it was started, or http://HOST:PORT of an engine's own server; "
    "needed where several engines run here. Nothing is imported; commands for queues (status, dead, purge) take "
    "MODULE:ENGINE"
)
_STAGE = "the task; needed where several run here"
_CODES = """\
exit codes: 0 done, or a run without an end stopped by a signal; 1 a task failed; 2 usage or configuration;
            3 a process could not start; 4 a stage's workers die too often; 5 through, with dead letters;
            143, 130, 129 a run that has an end stopped before it by SIGTERM, SIGINT, SIGHUP
"""
_EXAMPLES = f"""\
examples:
  sqspipes-mp demo                                  see it work: no AWS, no files left behind
  sqspipes-mp run words:engine                      run the engine of words.py until Ctrl-C
  sqspipes-mp run words:engine --only reduce --workers 8
  sqspipes-mp status words:engine                   what waits, runs and failed
  sqspipes-mp dead list words:engine                what was given up, and why

{_CODES}"""
_STACK = f"""\
The worker's own thread answers, which disturbs no call. With --signal the worker writes its stack in a signal handler,
also while C code keeps the GIL; the signal may make a C call that sleeps or waits return early. It never makes a call
count as late.

{_CODES}"""
_DEAD_EXAMPLES = f"""\
examples:
  sqspipes-mp dead list words:engine
  sqspipes-mp dead show words:engine 3f2a91c4       an id as listed, or any unique beginning of one
  sqspipes-mp dead replay words:engine 3f2a91c4     its function called here, to see why; --pdb to look around
  sqspipes-mp dead redrive words:engine 3f2a91c4    back into the queue it failed in, attempts counted anew
  sqspipes-mp dead redrive words:engine --error TimeoutError --since 2h
  sqspipes-mp dead discard words:engine --all

{_CODES}"""
_RUN_EXAMPLES = f"""\
examples:
  sqspipes-mp run words:engine --until drained      end when all work is done
  sqspipes-mp run words:engine --workers reduce=8 --workers count=auto
  sqspipes-mp run words:engine --only reduce --broker sqs://us-west-2
  SQSPIPES_BROKER=sqs://us-west-2 SQSPIPES_LOG_FORMAT=json sqspipes-mp run words:engine

Each flag also reads its environment variable: SQSPIPES_ONLY, SQSPIPES_WORKERS (both with commas), SQSPIPES_BROKER,
SQSPIPES_UNTIL, SQSPIPES_IDLE, SQSPIPES_WAIT_FOR_BROKER, SQSPIPES_ON_ERROR, SQSPIPES_LOG_LEVEL, SQSPIPES_LOG_FORMAT,
SQSPIPES_PROGRESS (on, off), SQSPIPES_HTTP, SQSPIPES_SUMMARY_JSON.
A flag is stronger than the code, the code than the environment. Ctrl-C and SIGTERM finish what runs and give the rest
back to its queue; a second one kills.

{_CODES}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. ``argv``: without the program's name; default: the process's."""
    open_streams()
    with _stopped_by(signal.SIGTERM):
        console = Console()
        try:
            flags = command_line().parse_args(argv)
            command: Command = flags.command
            code = command(flags, console)
            sys.stdout.flush()
        except OSError as error:
            if child_note(error) is not None or error.errno not in _OF_STDOUT or error.filename is not None:
                return _end(error, console)
            # The interpreter flushes stdout at its end, which must not fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                # The reader of the output has gone.
                return Exit.DONE
            return _end(Refused(f"the output could not be written: {error.strerror}", Exit.FAILED), console)
        except BaseException as error:
            return _end(error, console)
        return code


def _end(error: BaseException, console: Console) -> int:
    ending = ending_of(error, console.finish)
    if ending is None:
        raise error
    if ending.traceback is not None:
        # Of a child's exception, the engine's frames in this process say nothing.
        ours = _FOLDER if child_note(ending.traceback) is None else _PACKAGE
        ending.traceback.__traceback__ = _without(ours, ending.traceback.__traceback__)
    if ending.message:
        console.fail(ending.message, ending.traceback)
    return ending.code


def _without(folder: str, frames: TracebackType | None) -> TracebackType | None:
    """Return the traceback without the frames at its begin that are of files in ``folder``."""
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(folder):
        frames = frames.tb_next
    return frames


@contextmanager
def _stopped_by(number: signal.Signals) -> Iterator[None]:
    """Have a signal raise ``Stopped`` within the block; while an engine runs, the signal is the engine's."""

    def stop(_number: int, frame: FrameType | None) -> None:
        # Without a frame: the engine has drained for it, and has told so.
        if frame is not None:
            raise Stopped

    before = signal.signal(number, stop)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL if before is None else before)


def command_line() -> ArgumentParser:
    """Return the parser of every command; the documentation is made from it, too."""
    parser = ArgumentParser(
        prog=NAME,
        description="Run pipelines of Python functions in worker processes, over SQS or one SQLite file.",
        epilog=_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{NAME} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Command, text: str, epilog: str = _CODES) -> ArgumentParser:
        made = commands.add_parser(
            name, help=text, description=f"{text}.", epilog=epilog, formatter_class=RawDescriptionHelpFormatter
        )
        made.set_defaults(command=command)
        return made

    _add_run(add("run", run, "Run an engine, or some of its tasks", _RUN_EXAMPLES))
    one = add("status", status, "Show what is in each queue of a pipeline")
    one.add_argument("--json", action="store_true", help="as one JSON object")
    _add_target(one)
    for name, command, text in (
        ("purge", purge, "Remove every message of exactly this pipeline's queues"),
        ("delete", delete, "Delete exactly this pipeline's queues"),
    ):
        one = add(name, command, text)
        one.add_argument("--yes", action="store_true", help="do not ask (for scripts)")
        _add_target(one)
    _add_dead(
        commands.add_parser(
            "dead",
            help="Look at dead letters, put them back, or delete them",
            description="Messages that failed for the last allowed time, with the reason.",
            epilog=_DEAD_EXAMPLES,
            formatter_class=RawDescriptionHelpFormatter,
        )
    )
    _add_looking(add)
    one = add("doctor", doctor, "Tell what is wrong, or will be: machine, queues, rights, cost", DOCTOR_EPILOG)
    add_flags(one)
    _add_target(one)
    _add_demo(add("demo", demo, "Measure the standard library of this Python: a pipeline that ends by itself"))
    return parser


def _add_looking(add: Callable[..., ArgumentParser]) -> None:
    one = add("ps", ps, "Show the engines of this user that run on this machine")
    one.add_argument("target", metavar="TARGET", nargs="?", help="only this one: a domain, a pid, or MODULE:ENGINE")
    one.add_argument("--json", action="store_true", help="as one JSON array")
    one = add("top", top, "Show a running engine: its stages, its workers, and what they run")
    _add_running(one)
    one.add_argument("--once", action="store_true", help="show it once")
    one.add_argument("--json", action="store_true", help="all of it, once, as one JSON object")
    one = add("stack", stack, "Show where the workers of a stage are now, all their threads", _STACK)
    _add_running(one)
    one.add_argument("--stage", metavar="NAME", help=_STAGE)
    one.add_argument("--worker", metavar="N", type=int, help="only this worker, by its number in the stage")
    one.add_argument("--signal", action="store_true", help="ask by a signal, for one whose GIL is held in C code")
    for name, command, text in (
        ("pause", pause, "Pause a task of a running engine: no call of it begins until it is resumed"),
        ("resume", resume, "Have a paused task go on"),
    ):
        one = add(name, command, text)
        _add_running(one)
        one.add_argument("--stage", metavar="NAME", help=_STAGE)
    one = add("scale", scale, "Change the number of a task's workers until the running engine ends")
    _add_running(one)
    one.add_argument("workers", metavar="NAME=N", help="the task, and how many from now on; to have none, pause it")
    one = add("cancel", cancel, "Kill the worker of a running call, and dead-letter its message as Cancelled")
    _add_running(one)
    one.add_argument("id", metavar="ID", help="of the call's message, as top shows it, or another beginning of it")
    _add_running(add("stop", stop, "Stop a running engine, as SIGTERM does"))
    one = add("serve", serve, "Serve metrics, health and state of running engines over HTTP")
    one.add_argument(
        "target",
        metavar="TARGET",
        nargs="?",
        help="a domain, a pid, or the MODULE:ENGINE text; default: all engines here",
    )
    one.add_argument("--http", metavar="HOST:PORT", help="where; default: SQSPIPES_HTTP")
    # Only for the list of commands: __main__ runs it, and loads nothing else.
    add("health", lambda _flags, _console: Exit.USAGE, "Tell whether a running engine lives, for probes")


def _add_running(parser: ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", nargs="?", help=_RUNNING)


def _add_target(parser: ArgumentParser) -> None:
    parser.add_argument("target", metavar="MODULE:ENGINE", help=_TARGET)
    parser.add_argument("--broker", metavar="URL", help="sqs://REGION or sqlite:///FILE; default: what the code says")


def _add_run(parser: ArgumentParser) -> None:
    _add_target(parser)
    parser.add_argument("--only", metavar="NAME", action="append", help="run only this task here (repeatable)")
    parser.add_argument(
        "--workers",
        metavar="N|NAME=N",
        action="append",
        help='processes of a task, or "auto": one per CPU; NAME= where several tasks run (repeatable)',
    )
    parser.add_argument(
        "--until",
        metavar="|".join(UNTIL),
        help="drained: end when the source has ended and all queues are empty; stopped: go on until "
        "told; default: "
        "drained where the source is a generator and all tasks run here",
    )
    parser.add_argument(
        "--idle",
        metavar="SECONDS",
        help="with --until drained, where no source runs here: how long the queues must have been empty; default: 60, "
        "or 1 where all tasks of a fed pipeline run here on SQLite",
    )
    parser.add_argument(
        "--wait-for-broker",
        metavar="SECONDS",
        help="how long the start waits for a queue service that is not there yet; default: not at all",
    )
    parser.add_argument(
        "--on-error",
        metavar="|".join(POLICIES),
        help="what a task's exception does, for tasks without an on_error of their own: end the run, "
        "try the message again later, or dead-letter it",
    )
    parser.add_argument("--log-level", metavar="LEVEL", help=f"{', '.join(LEVELS)}; default: info")
    parser.add_argument("--log-format", metavar="|".join(FORMATS), help="default: text")
    parser.add_argument("--http", metavar="HOST:PORT", help="serve metrics and health there; :PORT is every interface")
    parser.add_argument("--summary-json", metavar="PATH", help="write the run's figures here at its end, as JSON")
    _add_progress(parser, "a table of the stages on a terminal, elsewhere a line of the log every 30 s")


def _add_progress(parser: ArgumentParser, what: str) -> None:
    parser.add_argument("--progress", action="store_const", const="on", help=f"show {what} (the default)")
    parser.add_argument("--no-progress", action="store_const", const="off", dest="progress", help="do not")


def _add_dead(parser: ArgumentParser) -> None:
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Command, text: str) -> ArgumentParser:
        made = verbs.add_parser(
            name, help=text, description=f"{text}.", epilog=_CODES, formatter_class=RawDescriptionHelpFormatter
        )
        made.set_defaults(command=command)
        _add_target(made)
        return made

    one = add("list", dead_list, "Show a line for each dead letter")
    add_choice(one)
    one.add_argument("--json", action="store_true", help="all that is known of each, as one JSON array")
    one = add("show", dead_show, "Show all that is known of one: reason, traceback, attempts, times, body")
    one.add_argument("id", metavar="ID", help="as listed, or any unique beginning of it")
    one.add_argument("--json", action="store_true", help="as a JSON object")
    one = add("replay", dead_replay, "Call the task's function here with the value of one, touching no queue")
    one.add_argument("id", metavar="ID", help="as listed, or any unique beginning of it")
    one.add_argument("--pdb", action="store_true", help="look around with the debugger where it fails")
    one = add("redrive", dead_redrive, "Put dead letters back into the queues they failed in, attempts counted anew")
    _add_ids(one)
    one = add("discard", dead_discard, "Delete dead letters")
    one.add_argument("--yes", action="store_true", help="do not ask (for scripts)")
    _add_ids(one)


def _add_ids(parser: ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] MODULE:ENGINE (ID... | --all | --stage NAME | --error NAME | ...)"
    # With "*" argparse takes none of them when an option stands between the target and the first.
    ids = parser.add_argument("ids", metavar="ID", nargs="+", help="as listed, or any unique beginning of it")
    ids.required = False
    parser.add_argument("--all", action="store_true", help="every dead letter of the pipeline")
    add_choice(parser)


def _add_demo(parser: ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", nargs="?", help="a folder of Python files, or one file, instead")
    parser.add_argument("--workers", metavar="N", default="auto", help="processes that measure; default: one per CPU")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object")
    _add_progress(parser, "how far it is")
