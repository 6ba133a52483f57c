"""Thumbnails and perceptual hashes of a folder of images, and which of them look alike. Needs Pillow.

::

    python examples/thumbnails.py make pictures --count 300    # some images to try it with
    python examples/thumbnails.py run pictures

Killed at any moment, ``kill -9`` included, and run again, it goes on where it was and prints the same.
"""

import argparse
import random
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from PIL import Image, ImageDraw

from sqspipes_mp import Engine, Reject, RemoteError, Task

SIZE = (128, 128)


def thumbnail(path: str) -> tuple[str, int]:
    """Write the thumbnail of an image beside it, and return its path and the image's hash."""
    try:
        with Image.open(path) as image:
            code = difference_hash(image)
            image.thumbnail(SIZE)
            made = image.convert("RGB")
    except OSError as error:
        # No image, or a broken one: another attempt reads the same.
        raise Reject(str(error)) from None
    # With the whole name: a.png and a.jpg are two images.
    small = Path(path).parent / "small" / f"{Path(path).name}.jpg"
    small.parent.mkdir(exist_ok=True)
    # Whole or not at all: a killed worker leaves the .part behind, and its message runs again.
    part = small.with_suffix(".part")
    made.save(part, "JPEG")
    part.replace(small)
    return str(small), code


def difference_hash(image: Image.Image) -> int:
    """Return 64 bits, nearly all the same in images that look alike: whether a pixel is brighter than its neighbour."""
    grey = image.convert("L").resize((9, 8)).tobytes()
    bits = (grey[row * 9 + column] > grey[row * 9 + column + 1] for row in range(8) for column in range(8))
    return sum(bit << place for place, bit in enumerate(bits))


engine = Engine(
    [Task(thumbnail, input=True, workers="auto", timeout=60, max_memory="1GiB")],
    domain="thumbnails",
    broker="sqlite:///thumbnails.db",
    on_error="retry",
)


def images(folder: Path) -> Iterator[str]:
    """Yield the absolute path of each image."""
    for path in sorted(folder.resolve().iterdir()):
        if path.suffix in {".png", ".jpg", ".webp"}:
            yield str(path)


def make(folder: Path, count: int) -> None:
    """Draw images; every tenth is its predecessor, a little brighter."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        dice = random.Random(number - 1 if number % 10 == 9 else number)
        image = Image.new("RGB", (640, 480), "grey")
        draw = ImageDraw.Draw(image)
        for _ in range(30):
            x, y, size = dice.randrange(600), dice.randrange(440), dice.randrange(20, 200)
            draw.ellipse((x, y, x + size, y + size), fill=tuple(dice.randrange(256) for _ in range(3)))
        if number % 10 == 9:
            image = image.point(lambda value: min(255, value + 8))
        image.save(folder / f"{number:04}.png")


def why(error: Exception) -> str:
    """Return why an image has no thumbnail, alike in every run: an earlier run's error is kept as its text."""
    return error.message if isinstance(error, RemoteError) else str(error)


def run(folder: Path) -> None:
    """Make the thumbnails that are missing, and print the broken images, and pairs of images that look alike."""
    codes, broken = {}, {}
    with engine.map(images(folder), key=str, keep_results=True, with_input=True, return_exceptions=True) as results:
        for path, result in results:
            if isinstance(result, Exception):
                broken[Path(path).name] = why(result)
            else:
                codes[Path(path).name] = result[1]
    for name, reason in sorted(broken.items()):
        print(f"{name}: {reason}")
    alike = sorted(pair for pair in combinations(sorted(codes), 2) if (codes[pair[0]] ^ codes[pair[1]]).bit_count() < 4)
    print(f"{len(codes)} thumbnails; alike: {', '.join(' and '.join(pair) for pair in alike)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("make", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=300)
    options = parser.parse_args()
    if options.do == "make":
        make(options.folder, options.count)
    else:
        run(options.folder)
