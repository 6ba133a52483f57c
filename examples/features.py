"""Find modules of the standard library by what they are about: text features with a model per worker. Needs numpy.

::

    python examples/features.py index                      # every module; or: index csv calendar datetime
    python examples/features.py find "parse a date"

The features are stored as they are made. Killed at any moment, ``kill -9`` included, ``index`` goes on where it was.
"""

import re
import sqlite3
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
import numpy.typing as npt

from sqspipes_mp import Engine, Task

BUCKETS, DIMENSIONS = 1 << 14, 128
STORE = "features.sqlite"


class Model:
    """Turns texts into vectors: hashed words, projected at random. Like a real model it takes long to load."""

    def __init__(self) -> None:
        self.projection = np.random.default_rng(7).standard_normal((BUCKETS, DIMENSIONS), dtype=np.float32)

    def __call__(self, texts: Sequence[str]) -> list[list[float]]:
        """Return a vector of length 1 for each text."""
        return [vector.tolist() for vector in self.vectors(texts)]

    def vectors(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return the vectors as rows of one matrix."""
        counts: npt.NDArray[np.float32] = np.zeros((len(texts), BUCKETS), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"[a-z]{3,}", text.lower()):
                counts[row, crc32(word.encode()) % BUCKETS] += 1
        found: npt.NDArray[np.float32] = np.log1p(counts) @ self.projection
        found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)
        return found


class Embed:
    """The stage in the middle: one model in each worker, many texts in each call."""

    def __init__(self) -> None:
        self.model = Model()

    def __call__(self, modules: list[tuple[str, str]]) -> list[tuple[str, list[float]]]:
        """Return (name, vector) of each (name, text)."""
        return list(zip([name for name, _ in modules], self.model([text for _, text in modules]), strict=True))


class Store:
    """The last stage: a row per module, written once however often its message comes."""

    def __init__(self) -> None:
        self.database = sqlite3.connect(STORE, isolation_level=None)
        self.database.execute("CREATE TABLE IF NOT EXISTS features (name PRIMARY KEY, vector)")

    def __call__(self, row: tuple[str, list[float]]) -> None:
        """Write a row."""
        name, vector = row
        self.database.execute(
            "INSERT OR REPLACE INTO features VALUES (?, ?)", (name, np.array(vector, dtype=np.float32).tobytes())
        )

    def close(self) -> None:
        """Close the file at the worker's end."""
        self.database.close()


def read(path: str) -> tuple[str, str]:
    """Return a module's name, and its comments, texts and names."""
    return Path(path).stem, Path(path).read_text(errors="replace")


engine = Engine(
    [Task(read, input=True), Task(Embed, workers="auto", batch=32), Task(Store)],
    domain="features",
    broker="sqlite:///features.db",
    on_error="retry",
)


def modules(names: Sequence[str]) -> Iterator[str]:
    """Yield the paths of these modules; of all where none is named."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("*.py")):
        if not names or path.stem in names:
            yield str(path)


def find(text: str) -> list[str]:
    """Return the names of the five modules that are nearest to a text."""
    rows = sqlite3.connect(STORE).execute("SELECT name, vector FROM features ORDER BY name").fetchall()
    vectors = np.array([np.frombuffer(vector, dtype=np.float32) for _, vector in rows])
    nearest = np.argsort(-(vectors @ Model().vectors([text])[0]))[:5]
    return [rows[index][0] for index in nearest]


if __name__ == "__main__":
    if sys.argv[1:2] == ["index"]:
        # A module that was sent before is dropped by its key.
        new = engine.put_many(modules(sys.argv[2:]), key=str)
        done = engine.run(until="drained", idle=0)["Store"].done
        print(f"{new} new, {done} stored")
    elif sys.argv[1:2] == ["find"]:
        print(*find(" ".join(sys.argv[2:])))
    else:
        sys.exit(__doc__)
