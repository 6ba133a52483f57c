from sqspipes_mp import Engine, Retry, Task

SITE = {
    "/": "<title>Home</title>",
    "/about": "<title>About</title>",
    "/busy": "<title>Later</title>",
}


def fetch(path):
    return {"path": path, "html": SITE[path]}


def parse(page):
    title = page["html"].removeprefix("<title>").removesuffix("</title>")
    return page["path"], title


def store(row):
    if not row[1]:
        raise Retry(30)  # Try again later.


engine = Engine(
    [Task(fetch, input=True, threads=8), Task(parse, workers="auto"), store],
    broker="sqlite://",
    on_error="retry",
)

if __name__ == "__main__":
    engine.put_many(SITE)
    print(engine.run(until="drained", idle=0)["store"].done, "done")
