import asyncio

from sqspipes_mp import Engine, Task


def square(n):
    return n * n


engine = Engine(
    [Task(square, input=True, workers=2)], domain="squares", broker="sqlite://"
)


def results(values):
    with engine.map(values, ordered=True) as squares:
        return list(squares)


async def main():
    print(await asyncio.to_thread(results, range(4)))


if __name__ == "__main__":
    asyncio.run(main())
