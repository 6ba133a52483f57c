from datetime import date

from sqspipes_mp import Engine, Reject, Retry, Task, TaskCallback, current_message


class Share:
    """Built once in each worker, with init_args: the place for a model."""

    def __init__(self, whole):
        self.whole = whole

    def __call__(self, n):
        if n < 0:
            raise Reject("negative")  # a dead letter, now
        if n == 4 and current_message().attempt == 1:
            raise Retry(delay=0.1)  # once more, later
        return {"day": date(2026, 1, 1), "share": self.whole / n}

    def close(self):
        """Called at a clean exit."""


def judge(error, attempt):
    return "reject" if isinstance(error, ZeroDivisionError) else "retry"


def tell(row):
    message = current_message()
    if row["share"] == 20:
        return None  # nothing goes on
    # print() is called once row was accepted.
    return TaskCallback(row, print, (message.id, message.priority, row))


engine = Engine(
    [Task(Share, init_args=(60,), input=True, priorities=2, timeout=30), tell],
    broker="sqlite:///recipes.db",
    on_error=judge,  # or "raise", "retry", "reject"; each Task may have its own
    json_default=str,  # for what JSON has not: dates, UUIDs, Decimals
)

if __name__ == "__main__":
    values = [0, 2, 3, 4, -1]
    engine.put_many(values, key=lambda n: f"n{n}", priority=lambda n: int(n > 2))
    engine.run(until="drained", idle=0)
    for dead in engine.dead_letters():
        failure = dead.failure
        print(dead.stage, dead.value, failure.attempts, failure.error, failure.text)
    engine.purge()  # the dead letters and the keys, too
