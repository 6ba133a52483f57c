"""The examples do what they say, and each goes on where it was interrupted."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gates import eventually

_ROOT = Path(__file__).parents[2]


class Program:
    """An example in a folder of its own."""

    def __init__(self, folder: Path, name: str, **environ: str) -> None:
        self.folder = folder
        self.name = name
        self.environ = {**os.environ, "PYTHONPATH": str(_ROOT), **environ}
        shutil.copy(_ROOT / "examples" / name, folder)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start it, or with ``-m`` first a module."""
        command = arguments if arguments[0] == "-m" else (self.name, *arguments)
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=self.folder,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def output(self, *arguments: str, status: int = 0) -> str:
        """Run it to its end, and return its standard output."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=100)
        assert process.returncode == status, err
        return out

    def interrupt(self, *arguments: str, once: str) -> None:
        """Start it, and interrupt it as soon as the file ``once`` is there."""
        process = self.start(*arguments)
        assert eventually((self.folder / once).exists)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=100)


def test_thumbnails_are_made_once_and_alike_ones_found(tmp_path):
    pytest.importorskip("PIL")
    example = Program(tmp_path, "thumbnails.py")
    example.output("make", "pictures", "--count", "20")
    pictures, small = tmp_path / "pictures", tmp_path / "pictures" / "small"
    # The same stem as another image; no image at all; one that ends too early.
    shutil.copy(pictures / "0008.png", pictures / "0007.webp")
    (pictures / "bad.png").write_text("no image")
    (pictures / "cut.png").write_bytes((pictures / "0001.png").read_bytes()[:2000])
    example.interrupt("run", "pictures", once="thumbnails.db")
    told = example.output("run", "pictures")
    bad, cut, last = told.splitlines()
    assert bad == f"bad.png: cannot identify image file {str(pictures / 'bad.png')!r}"
    assert cut.startswith("cut.png: image file is truncated")
    alike = "0007.webp and 0008.png, 0007.webp and 0009.png, 0008.png and 0009.png, 0018.png and 0019.png"
    assert last == f"21 thumbnails; alike: {alike}"
    made = {path: path.stat().st_mtime_ns for path in small.iterdir()}
    assert example.output("run", "pictures") == told
    assert {path: path.stat().st_mtime_ns for path in small.iterdir()} == made
    assert len(made) == 21


def test_modules_are_found_by_what_they_are_about(tmp_path):
    pytest.importorskip("numpy")
    example = Program(tmp_path, "features.py")
    example.interrupt("index", "csv", "calendar", "zipfile", "socket", once="features.db")
    example.output("index", "csv", "calendar", "socket")
    assert example.output("index", "csv", "calendar", "socket") == "0 new, 0 stored\n"
    assert example.output("find", "week", "month", "year").split()[0] == "calendar"


def test_calls_that_were_refused_are_made_once_the_service_is_mended(tmp_path):
    example = Program(tmp_path, "calls.py", CALLS_ADDRESS="127.0.0.1:0")
    service = example.start("serve")
    assert service.stdout is not None
    try:
        address = example.environ["CALLS_ADDRESS"] = service.stdout.readline().split()[-1]
        assert address.startswith("127.0.0.1:")
        # More calls at once than the service takes: some come again, and none is dead-lettered for it.
        assert example.output("ask", "30") == f"30 new; 29 answers, their sum is {_squares(30) - 13 * 13}; 1 refused\n"
        assert " Reject: " in example.output("-m", "sqspipes_mp", "dead", "list", "calls:engine")
        _end(service)
        service = example.start("serve", "--all")
        assert service.stdout is not None
        assert service.stdout.readline().split()[-1] == address
        example.output("-m", "sqspipes_mp", "dead", "redrive", "calls:engine", "--all")
        assert example.output("ask", "30") == f"0 new; 30 answers, their sum is {_squares(30)}; 0 refused\n"
    finally:
        _end(service)
    rows = sqlite3.connect(tmp_path / "calls.sqlite")
    assert rows.execute("SELECT count(*) FROM answers").fetchone() == (30,)
    rows.close()


def _squares(count: int) -> int:
    return sum(number * number for number in range(count))


def _end(service: subprocess.Popen[str]) -> None:
    service.terminate()
    service.communicate(timeout=60)
