from sqspipes_mp import Engine, Task


def square(n):
    return n * n


engine = Engine(
    [Task(square, input=True, workers=2), Task(print, name="show")],
    broker="sqlite:///feed.db",
)

if __name__ == "__main__":
    engine.put(12, key="the dozen")
    new = engine.put_many(
        range(5), key=lambda n: f"n-{n}", progress=lambda sent: print(sent, "sent")
    )
    again = engine.put_many(range(6), key=lambda n: f"n-{n}")
    print(new, "new, then", again)
    print(engine.run(until="drained", idle=0)["square"].done, "done")
