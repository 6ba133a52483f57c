import time

from sqspipes_mp import Engine, SQLite, Task


def numbers():
    yield from range(64)


def fetch(number):
    time.sleep(0.1)  # An answer from far away.
    return f"title {number}"


if __name__ == "__main__":
    engine = Engine([numbers, Task(fetch, threads=32)], broker=SQLite())
    with engine.run(iterate=True, until="drained") as titles:
        print(len(list(titles)))
