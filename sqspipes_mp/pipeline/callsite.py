"""Whose code is calling: the user's file behind this package's own frames (caller)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_PACKAGE = str(Path(__file__).parent.parent) + os.sep


def constructing_file() -> str | None:
    """Return the file of the code that builds the engine: the nearest frame outside this package."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        if frame.f_back is None:
            return None
        frame = frame.f_back
    name = frame.f_globals.get("__file__")
    return name if isinstance(name, str) else None
