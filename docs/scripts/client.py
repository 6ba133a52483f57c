import random
import sys

from sqspipes_mp import TaskClient


def number(most):
    return random.randint(1, most)


def double(n):
    return 2 * n


# Without broker= it is at SQS, in us-west-2. Queues are FIFO unless fifo=False.
client = TaskClient("doubles", broker="sqlite:///doubles.db")
client.register_tasks(
    [{"method": number, "interval": 0.1}, {"method": double, "workers": 2}]
)

if __name__ == "__main__":
    if sys.argv[1:] == ["number"]:
        client.run("number", args=(100,))
    else:
        for result in client.run("double", iterate=True):
            print(result)
