import json
import sys
from pathlib import Path

from sqspipes_mp import Engine, Task


def smallest_factor(n):
    return n, next((d for d in range(2, int(n**0.5) + 1) if n % d == 0), None)


def store(pair):
    """Write a result to its own file: a message that comes again does no harm."""
    number, factor = pair
    Path("results", f"{number}.json").write_text(json.dumps(factor))


engine = Engine(
    [Task(smallest_factor, input=True, workers="auto"), Task(store)],
    domain="fleet",
)

if __name__ == "__main__":
    if sys.argv[1] == "feed":
        Path("results").mkdir(exist_ok=True)
        print(engine.put_many(range(2, 1000)), "sent")
    else:
        found = {path.stem: path.read_text() for path in Path("results").iterdir()}
        primes = [int(stem) for stem, text in found.items() if text == "null"]
        print(len(primes), sorted(primes)[:5])
