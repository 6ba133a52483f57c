"""The folder of a temporary file, and the removal of folders whose owner was killed (any process).

Its owner, and the children that it forks, hold a lock on a file in it. The kernel frees the lock with the last of them,
so a folder whose lock can be had is nobody's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX, _LOCK = "sqspipes-mp-", "owner.lock"

#: The locks that this process holds, by folder.
_held: dict[str, int] = {}


def make() -> str:
    """Make a folder and hold it; remove those of this user's that nobody holds. Raises ``OSError``."""
    _sweep(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX)).resolve()
    # Locked before it has the name by which another process would look for it.
    unnamed = folder / f".{_LOCK}"
    fd = os.open(unnamed, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(OSError):
        # Without locks in the file system the folder has no lock file, and nobody removes it.
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(folder / _LOCK)
    _held[str(folder)] = fd
    return str(folder)


def remove(folder: str) -> None:
    """Remove a folder and let go of it."""
    shutil.rmtree(folder, ignore_errors=True)
    fd = _held.pop(folder, None)
    if fd is not None:
        os.close(fd)


def _sweep(temporary: Path) -> None:
    """Remove the folders of this user's in ``temporary`` whose owner is gone."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(temporary):
            if entry.name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _remove_where_nobodys(entry)


def _remove_where_nobodys(entry: os.DirEntry[str]) -> None:
    """Remove a folder where its lock is free. Raises ``OSError`` where it is held, or there is none."""
    if entry.stat(follow_symlinks=False).st_uid != os.geteuid() or entry.path in _held:
        return
    fd = os.open(Path(entry.path, _LOCK), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(entry.path, ignore_errors=True)
    finally:
        os.close(fd)
