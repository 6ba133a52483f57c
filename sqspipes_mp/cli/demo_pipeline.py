"""A whole pipeline: find Python files, measure their functions, rank the most complex ones of each file."""

import ast
import heapq
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqspipes_mp import Engine, SQLite, Task
from sqspipes_mp.cli.demo_complexity import complexities


def find(root: str) -> Iterator[str]:
    """Yield the path of each Python file below a folder; site-packages and hidden folders are left out."""
    if Path(root).is_file():
        yield root
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name != "site-packages" and not name.startswith("."))
        for name in sorted(names):
            if name.endswith(".py"):
                # Messages are text: a name that is no text is escaped, and its file gets an error.
                yield f"{folder}/{name}".encode(errors="backslashreplace").decode()


def measure(path: str) -> dict[str, Any]:
    """Parse a file and measure its functions: the CPU-bound stage. A file that cannot be parsed has an error."""
    if not Path(path).is_file():
        return {"path": path, "error": "no regular file"}
    try:
        source = Path(path).read_bytes()
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source, path)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"path": path, "error": f"{type(error).__name__}: {error}"}
    return {"path": path, "lines": len(source.splitlines()), "functions": list(complexities(tree))}


def rank(measured: dict[str, Any], keep: int = 10) -> dict[str, Any]:
    """Keep the most complex functions of a file, and the number of all."""
    functions = measured.get("functions", [])
    return {**measured, "functions": len(functions), "top": heapq.nlargest(keep, functions)}


def pipeline(root: str, workers: Any = "auto") -> Engine:
    """Join the three functions by queues in a temporary SQLite file."""
    return Engine([Task(find, args=(root,)), Task(measure, workers=workers), rank], domain="demo", broker=SQLite())


if __name__ == "__main__":
    engine = pipeline(sys.argv[1])
    for report in engine.run(iterate=True, until="drained"):
        for complexity, name, line in report["top"][:1]:
            print(f"{complexity:4} {name}  {report['path']}:{line}")
