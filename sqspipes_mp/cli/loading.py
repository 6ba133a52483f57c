"""MODULE:ENGINE: import the user's module and take the engine out of it (the command line's process)."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from sqspipes_mp.caller.importing import importing
from sqspipes_mp.cli.exits import Exit, Refused, Stopped
from sqspipes_mp.engine import Engine
from sqspipes_mp.errors import ConfigError

_PACKAGE = str(Path(__file__).parent.parent) + os.sep
#: Files whose frames tell nothing about the user's module.
_IMPORTING = (_PACKAGE, "<frozen importlib", str(importlib.__file__))


def load(target: str) -> Engine:
    """Return the engine that ``target`` names.

    Args:
        target: "words:engine" or "./words.py:engine"; ``engine`` is an ``Engine``, or a function that returns one.

    Raises:
        Refused: with code USAGE where there is no such engine, with BOOT where the user's code fails.
    """
    source, _, name = target.rpartition(":") if ":" in target else (target, "", "")
    if not source:
        raise Refused(f"MODULE:ENGINE must name a module, got {target!r}. Write words:engine for engine in words.py")
    module = _import_file(source) if source.endswith(".py") or os.sep in source else _import(source)
    if not name:
        raise Refused(f"MODULE:ENGINE must name the engine, too, got {target!r}. {_found(source, module)}")
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise Refused(f"{source} has no {name!r}. {_found(source, module, name)}")
        value = getattr(value, part)
    if inspect.isroutine(value):
        value = _call(target, value)
    if not isinstance(value, Engine):
        raise Refused(
            f"{target} must be an Engine or a function returning one, is of type {type(value).__name__}. "
            f"{_found(source, module)}"
        )
    return value


def _found(source: str, module: ModuleType, wanted: str = "") -> str:
    engines = [name for name, value in vars(module).items() if isinstance(value, Engine)]
    if not engines:
        return "There is no Engine in it: write engine = Engine([...]) at its top level"
    near = get_close_matches(wanted, engines, 1)
    if near:
        return f"Did you mean {source}:{near[0]}?"
    return f"Engines there: {', '.join(f'{source}:{name}' for name in engines)}"


def _call(target: str, function: Any) -> Any:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise Refused(f"{target} must be callable without arguments to return an Engine: {error}") from None
    except ValueError:
        return None  # A built-in without a signature.
    return _users_code(f"calling {target}", function)


def _import(name: str) -> ModuleType:
    _put_first(Path.cwd())
    try:
        found = importlib.util.find_spec(name.partition(".")[0])
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise Refused(f"there is no module {name!r}, in {Path.cwd()} or installed.{_near_files(name)}")
    try:
        module = _module(name, name)
    except Refused as refused:
        cause = refused.__cause__
        # The module itself is missing, and no import of it.
        if isinstance(cause, ModuleNotFoundError) and cause.name and f"{name}.".startswith(f"{cause.name}."):
            raise Refused(f"there is no module {name!r} ({cause}).{_near_files(name)}") from None
        raise
    return module


def _import_file(source: str) -> ModuleType:
    file = Path(source).absolute()
    if not file.is_file():
        raise Refused(f"there is no file {source!r}, in {Path.cwd()}.{_near_files(file.stem, file.parent)}")
    parts, folder = [file.stem], file.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    if parts[-1] == "__init__":
        parts.pop()
    name = ".".join(parts)
    if not all(part.isidentifier() for part in parts):
        raise Refused(f"{source!r} cannot be imported as a module: rename it to letters, digits and _")
    _put_first(folder)
    module = _module(name, source)
    origin = getattr(module, "__file__", None)
    # Children import the module by this name, so the name has to mean this file.
    if origin is None or not Path(origin).samefile(file):
        raise Refused(f"the module name {name!r} of {source!r} is taken by {origin or 'a built-in'}: rename the file")
    return module


def _module(name: str, source: str) -> ModuleType:
    """Import a module of the user's, that ``source`` names. Raises ``Refused``."""
    with importing(source):
        module: ModuleType = _users_code(f"importing {source}", lambda: importlib.import_module(name))
    return module


def _users_code(what: str, function: Any) -> Any:
    """Call a function that runs the user's code. Raises ``Refused`` from its exception, without frames of ours."""
    try:
        return function()
    except (Stopped, KeyboardInterrupt):
        raise
    except BaseException as error:
        # SystemExit included: a module must not end the program.
        error.__traceback__ = _own(error.__traceback__)
        if isinstance(error, ConfigError):
            raise Refused(f"{_place(error)}{error}") from None
        raise Refused(f"{what} failed: see the traceback", Exit.BOOT) from error


def _own(frames: TracebackType | None) -> TracebackType | None:
    """Return the frames from the user's first on; none for a missing module or a syntax error, whose text is enough."""
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_IMPORTING):
        frames = frames.tb_next
    return frames


def _place(error: BaseException) -> str:
    """Return "file:line: " of the user's innermost line."""
    place, frames = "", error.__traceback__
    while frames is not None:
        if not frames.tb_frame.f_code.co_filename.startswith(_PACKAGE):
            place = f"{frames.tb_frame.f_code.co_filename}:{frames.tb_lineno}: "
        frames = frames.tb_next
    return place


def _put_first(folder: Path) -> None:
    path = str(folder)
    if path in sys.path:
        sys.path.remove(path)
    sys.path.insert(0, path)


def _near_files(name: str, folder: Path | None = None) -> str:
    place = Path.cwd() if folder is None else folder
    stems = [file.stem for file in place.glob("*.py")] if place.is_dir() else []
    near = get_close_matches(name, stems, 3, 0.7)
    return f" Did you mean {' or '.join(near)}?" if near else ""
