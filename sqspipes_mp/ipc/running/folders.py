"""The registry's folders, and the engines registered there (any process). Light.

Per run there are ``{run id}.json``, which describes it, and ``{run id}.sock``, which takes orders. The supervisor
holds a lock on the first one for as long as it lives, and the lock alone says that it does. A pid would be no evidence,
since containers may share a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: The variable that names the folder; "off": no registry.
VARIABLE = "SQSPIPES_RUN_DIR"
_NAME = "sqspipes_mp"
#: Most bytes of a run's description.
_MOST = 1 << 20


def candidates() -> list[str]:
    """Return the folders that may be the registry, the preferred one first; none where it is switched off."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return [] if chosen == "off" else [os.path.abspath(chosen)]
    # Not ``tempfile``, whose import takes as long as the look.
    temporary = os.environ.get("TMPDIR") or "/tmp"  # noqa: S108  (looked at before it is used)
    own = f"{_NAME}-{os.geteuid()}"
    found = [f"/run/{own}", f"{temporary}/{own}", f"/dev/shm/{own}"]  # noqa: S108
    session = os.environ.get("XDG_RUNTIME_DIR")
    return [f"{session}/{_NAME}", *found] if session else found


def open_folder(path: str) -> int:
    """Return a descriptor of a registry's folder. Raises ``OSError``; ``PermissionError``, with why, for an unsafe one.

    A safe folder is the user's own, no link, and not writable by others; the opened one is looked at, not its name.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(fd)
    problem = None
    if found.st_uid != os.geteuid():
        problem = f"it belongs to user {found.st_uid}"
    elif found.st_mode & 0o022:
        problem = "others may write to it"
    if problem is not None:
        os.close(fd)
        raise PermissionError(problem)
    return fd


class Unanswered(Exception):
    """An engine cannot be asked, or refuses; the text says why."""


class Engine:
    """A registered engine that was alive when it was found."""

    def __init__(self, folder: str, run: str, about: dict[str, object]) -> None:
        self.folder = folder
        #: The run's id.
        self.run = run
        #: The description that the supervisor wrote (``supervisor/registration.py``).
        self.about = about

    def number(self, key: str) -> int:
        """Return a whole number of the description; 0 where there is none."""
        value = self.about.get(key)
        return value if isinstance(value, int) else 0

    def text(self, key: str) -> str:
        """Return a text of the description; empty where there is none."""
        value = self.about.get(key)
        return value if isinstance(value, str) else ""

    @property
    def name(self) -> str:
        """The engine's name for people."""
        return f"{self.text('domain')} (pid {self.number('pid')})"

    @property
    def stages(self) -> list[str]:
        """The names of the pipeline's stages, by their indexes."""
        stages = self.about.get("stages")
        return [str(stage) for stage in stages] if isinstance(stages, list) else []

    @property
    def here(self) -> bool:
        """Whether the engine has this process's pid namespace, so that its pids mean something here."""
        return self.about.get("pid_namespace") == pid_namespace()


def pid_namespace() -> int:
    """Return the id of this process's pid namespace; 0 where the system has none."""
    with contextlib.suppress(OSError):
        return os.stat("/proc/self/ns/pid").st_ino
    return 0


def engines() -> list[Engine]:
    """Return the engines of this user that are alive, the oldest first; remove the files of dead ones."""
    found: list[Engine] = []
    for path in candidates():
        # A folder that is missing, or not safe, registers nobody.
        with contextlib.suppress(OSError):
            folder = open_folder(path)
            try:
                names = sorted(name for name in os.listdir(folder) if name.endswith((".json", ".new")))
                found += [engine for name in names if (engine := _look(path, folder, name)) is not None]
            finally:
                os.close(folder)
    return sorted(found, key=lambda engine: (engine.number("began"), engine.run))


def _look(path: str, folder: int, name: str) -> Engine | None:
    """Return the engine of a file; None where it is dead, or the file is none of ours."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return None
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_size > _MOST:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read(path, fd, name) if name.endswith(".json") else None
        _remove(folder, fd, name)
    except OSError:
        return None
    finally:
        os.close(fd)
    return None


def _read(path: str, fd: int, name: str) -> Engine | None:
    try:
        about = loads(os.pread(fd, _MOST, 0).decode())
    except (ValueError, RecursionError):
        return None
    run = name.removesuffix(".json")
    return Engine(path, run, about) if isinstance(about, dict) and about.get("run") == run else None


def loads(text: str) -> object:
    """Parse JSON as ``json.loads`` does, whose import is a third of a health check's time.

    Raises ``ValueError`` and ``RecursionError``.
    """
    try:
        # The part of json that is C code; it takes its options as attributes, and its errors from the rest.
        scanner: Any = import_module("_json").make_scanner(_Options)
        return scanner(text, 0)[0]
    except Exception:
        import json  # noqa: PLC0415

        return json.loads(text)


class _Options:
    """The options of ``json.loads`` as its scanner reads them."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = float, int, float
    memo: dict[str, str] = {}  # noqa: RUF012  (the scanner's own)


def _remove(folder: int, fd: int, name: str) -> None:
    """Remove a dead engine's files, where the lock is to be had and the name still means the locked file."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=folder, follow_symlinks=False))
    except OSError:
        # Another reader looks as well, or has removed it.
        return
    if same:
        for left in (f"{name.rpartition('.')[0]}.sock", name):
            with contextlib.suppress(OSError):
                os.unlink(left, dir_fd=folder)


def matches(engine: Engine, target: str) -> bool:
    """Tell whether a person means this engine: by its domain, a pid, or the MODULE:ENGINE text as it was started."""
    pids = {str(engine.number("pid")), str(engine.number("caller"))}
    return target in pids or target in {engine.text("domain"), engine.text("target")} - {""}
