import json
import operator
import random
from pathlib import Path

from sqspipes_mp import Continue, Engine, Task, current_message


def estimate(job):
    message = current_message()
    generator = random.Random(job["seed"])
    if "file" in job:
        version, words, gauss = json.loads(Path(job["file"]).read_text())
        generator.setstate((version, tuple(words), gauss))
    while job["done"] < job["points"]:
        # One part before it looks: so even a call that must end at once gets on.
        for _ in range(10_000):
            job["inside"] += generator.random() ** 2 + generator.random() ** 2 < 1
        job["done"] += 10_000
        if message.stopping and job["done"] < job["points"]:
            file = Path(f"{message.hop}-{job['done']}.state").absolute()
            part = file.with_suffix(".part")
            part.write_text(json.dumps(generator.getstate()))
            part.replace(file)
            return Continue({**job, "file": str(file)})
    return 4 * job["inside"] / job["points"]


engine = Engine(
    [Task(estimate, input=True, workers=2)], domain="pi", broker="sqlite:///pi.db"
)

if __name__ == "__main__":
    begin = {"points": 200_000, "done": 0, "inside": 0}
    jobs = [{"seed": seed, **begin} for seed in (7, 8)]
    seed = operator.itemgetter("seed")
    print(*engine.map(jobs, key=seed, ordered=True, keep_results=True))
