"""``run --summary-json``: the figures of a run that ends before anybody scrapes it (the command line's process)."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from sqspipes_mp import __version__
from sqspipes_mp.cli.exits import Exit, Refused
from sqspipes_mp.ipc.summary import Summary


def check_writable(source: str, path: Path) -> None:
    """Raise ``Refused`` where the file will not be to be had, before the run; ``source``: the flag or variable."""
    if path.exists():
        problem = "is a folder" if path.is_dir() else "" if os.access(path, os.W_OK) else "cannot be written"
    else:
        problem = "" if os.access(path.parent, os.W_OK | os.X_OK) else f"is in {path.parent}, which cannot be written"
    if problem:
        raise Refused(f"{source} must be a file that can be written; {path} {problem}")


def write_summary(path: Path, domain: str, summary: Summary) -> None:
    """Write a run's summary as one JSON object, whole or not at all. Raises ``Refused``."""
    text = json.dumps({"domain": domain, "version": __version__, **asdict(summary)}) + "\n"
    try:
        if path.exists() and not path.is_file():
            # A pipe, or a terminal.
            path.write_text(text)
            return
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                file.write(text)
                file.close()
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink()
                raise
    except OSError as error:
        raise Refused(f"the summary could not be written: {error}", Exit.FAILED) from None
