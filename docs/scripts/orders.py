import json
import sqlite3
import sys
from pathlib import Path

from sqspipes_mp import Engine, Task, current_message


def read(path):
    return json.loads(Path(path).read_text())


def total(order):
    return {
        "order": order["id"],
        "cents": sum(line["count"] * line["cents"] for line in order["lines"]),
    }


class Store:
    """Keeps totals in a file; a message that comes twice is written once."""

    def __init__(self, path):
        self.database = sqlite3.connect(path, isolation_level=None)
        self.database.execute(
            "CREATE TABLE IF NOT EXISTS totals (hop PRIMARY KEY, number, cents)"
        )

    def __call__(self, row):
        values = (current_message().hop, row["order"], row["cents"])
        self.database.execute(
            "INSERT INTO totals VALUES (?, ?, ?) ON CONFLICT DO NOTHING", values
        )

    def close(self):
        self.database.close()


engine = Engine(
    [
        Task(read, input=True),
        Task(total, workers=2),
        Task(Store, init_args=("totals.db",)),
    ],
    domain="orders",
)


def make(count):
    """Write some orders; the one with number 7 has no lines."""
    folder = Path("orders")
    folder.mkdir(exist_ok=True)
    for number in range(count):
        lines = [{"count": number, "cents": 250}, {"count": 1, "cents": 99}]
        order = {"id": number} if number == 7 else {"id": number, "lines": lines}
        Path(folder, f"{number}.json").write_text(json.dumps(order))


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(40)
    elif sys.argv[1] == "feed":
        paths = map(str, sorted(Path("orders").iterdir()))
        print(engine.put_many(paths, key=str), "new orders")
    else:
        totals = sqlite3.connect("totals.db")
        print(*totals.execute("SELECT count(*), sum(cents) FROM totals").fetchone())
