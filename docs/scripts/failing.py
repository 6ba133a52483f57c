from sqspipes_mp import Engine, RemoteError, Task


def inverse(n):
    return 1 / n


def why(error):
    """Return the same text in every run: of an earlier run there are only texts."""
    return error.message if isinstance(error, RemoteError) else str(error)


engine = Engine([Task(inverse, input=True)], broker="sqlite:///failing.db")

if __name__ == "__main__":
    results = engine.map(
        [4, 0, 2],
        key=str,
        keep_results=True,
        with_input=True,
        return_exceptions=True,
    )
    pairs = list(results)
    print(
        {
            n: result
            for n, result in sorted(pairs)
            if not isinstance(result, Exception)
        }
    )
    print(
        {
            n: why(result)
            for n, result in sorted(pairs)
            if isinstance(result, Exception)
        }
    )
