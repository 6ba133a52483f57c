from sqspipes_mp import Engine, Task


def smallest_factor(n):
    return n, next((d for d in range(2, int(n**0.5) + 1) if n % d == 0), None)


engine = Engine(
    [Task(smallest_factor, input=True, workers="auto")],
    broker="sqlite:///primes.db",
)

if __name__ == "__main__":
    results = engine.map(range(2, 30_000), key=str, keep_results=True)
    primes = [n for n, factor in results if factor is None]
    print(len(primes), sorted(primes)[:5])
