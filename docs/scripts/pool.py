from concurrent.futures import ProcessPoolExecutor

from sqspipes_mp import Engine, Task


def collatz(n):
    steps = 0
    while n != 1:
        n = 3 * n + 1 if n % 2 else n // 2
        steps += 1
    return steps


engine = Engine(
    [Task(collatz, input=True, workers=2)], broker="sqlite:///collatz.db"
)

if __name__ == "__main__":
    values = range(1, 200)
    with ProcessPoolExecutor(2) as pool:
        there = list(pool.map(collatz, values))
    here = list(engine.map(values, key=str, ordered=True, keep_results=True))
    print("same" if here == there else "different")
