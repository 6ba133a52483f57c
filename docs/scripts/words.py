import random
import string

from sqspipes_mp import Engine, Task


def generate(max_size):
    """Make a random word. The first task gets no input; it is called for ever."""
    size = random.randint(1, max_size)
    return "".join(random.choice(string.ascii_lowercase) for _ in range(size))


def reduce(value, keep="vowels"):
    kept = [letter for letter in value if (letter in "aeiou") == (keep == "vowels")]
    return value, "".join(kept)


def count(data):
    value, kept = data
    return value, len(kept)


engine = Engine(
    [
        Task(generate, args=(16,), interval=0.01),
        Task(reduce, workers=2),
        Task(count, workers="auto"),
    ],
    domain="words",
)

if __name__ == "__main__":
    for word, vowels in engine.run(iterate=True):
        print(word, vowels)
