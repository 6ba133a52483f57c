import logging

from sqspipes_mp import Engine, Task, current_message

log = logging.getLogger("app")


def configure():
    logging.basicConfig(level="INFO", format="%(message)s")
    logging.getLogger("sqspipes_mp").setLevel("WARNING")


def double(n):
    log.info("worker of %s: %d", current_message().stage, n)
    return 2 * n


engine = Engine(
    [Task(double, input=True)],
    domain="logs",
    broker="sqlite://",
    setup=configure,
    start_method="forkserver",
)

if __name__ == "__main__":
    configure()
    print(list(engine.map([21])))
