import json
from urllib.parse import unquote_plus

from sqspipes_mp import Engine, Task


def keys(body):
    event = json.loads(body)
    # Sent once, when notifications are set up.
    if event.get("Event") == "s3:TestEvent":
        return None
    records = event["Records"]
    return [unquote_plus(record["s3"]["object"]["key"]) for record in records]


def each(names):
    yield from names


def measure(name):
    print(name, len(name))


engine = Engine(
    [
        Task(each, input="my-bucket-events", decode=keys),
        Task(measure, workers="auto"),
    ],
    domain="uploads",
)

if __name__ == "__main__":
    engine.run()
