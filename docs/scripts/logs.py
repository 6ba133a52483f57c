import logging

from sqspipes_mp import Engine, Task, current_message

log = logging.getLogger("app")


def double(n):
    log.info("worker of %s: %d", current_message().stage, n)
    return 2 * n


engine = Engine(
    [Task(double, input=True)],
    domain="logs",
    broker="sqlite://",
    start_method="forkserver",
)

if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(processName)s, %(message)s")
    logging.getLogger("sqspipes_mp").setLevel("WARNING")
    print(list(engine.map([21])))
