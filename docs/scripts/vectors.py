from sqspipes_mp import Engine, SQLite, Task


def numbers():
    yield from range(1000)


def squares(values):
    return [value * value for value in values]


if __name__ == "__main__":
    engine = Engine([numbers, Task(squares, batch=100)], broker=SQLite())
    with engine.run(iterate=True, until="drained") as results:
        print(sum(results))
