from celery import Celery, chain

app = Celery("pages", broker="sqs://")
app.conf.task_acks_late = True
app.conf.task_always_eager = (
    True  # To try it: everything in this process, no broker.
)

SITE = {
    "/": "<title>Home</title>",
    "/about": "<title>About</title>",
    "/busy": "<title>Later</title>",
}


@app.task(autoretry_for=(Exception,), retry_backoff=True, max_retries=5)
def fetch(path):
    return {"path": path, "html": SITE[path]}


@app.task
def parse(page):
    title = page["html"].removeprefix("<title>").removesuffix("</title>")
    return page["path"], title


@app.task(bind=True)
def store(self, row):
    if not row[1]:
        raise self.retry(countdown=30)
    return 1


if __name__ == "__main__":
    jobs = [chain(fetch.s(path), parse.s(), store.s()) for path in SITE]
    results = [job.apply_async() for job in jobs]
    print(sum(result.get() for result in results), "done")
