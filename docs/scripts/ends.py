from sqspipes_mp import Engine, Task


def numbers(count):
    yield from range(count)


def square(value):
    return value * value


if __name__ == "__main__":
    engine = Engine(
        [Task(numbers, args=(1000,)), Task(square, workers="auto")],
        broker="sqlite://",
    )
    with engine.run(iterate=True, until="drained") as results:
        print(sum(results))
    print(results.summary.reason, results.summary["square"].done)
