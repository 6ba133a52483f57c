"""The answers of the server: paths, who may have them, JSON (the HTTP process)."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sqspipes_mp.ipc.running.folders import Unanswered, matches
from sqspipes_mp.ipc.running.health import Verdict
from sqspipes_mp.ipc.running.outcomes import outcome
from sqspipes_mp.ipc.running.state import add_notes
from sqspipes_mp.observer.access import Access, Sight, numbers_only
from sqspipes_mp.observer.looked import Fresh, Looked
from sqspipes_mp.observer.metrics import Collector

#: Most bytes of an order, seconds for them to come, and for its answer.
_ORDER, _BODY, _PATIENCE = 16_384, 5.0, 15.0
#: Orders on their way to engines at once: each engine takes 16 clients, and others want to ask, too.
_ORDERS = 4
#: Sent with every answer.
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_NEEDS_TOKEN = (
    "this needs the token: set SQSPIPES_HTTP_TOKEN where the engine runs, and send Authorization: Bearer TOKEN"  # noqa: S105
)

#: The page's files and their types, by their paths.
_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


class Observer:
    """What is answered of the engines that ``engines`` returns."""

    def __init__(self, engines: Callable[[], Sequence[Looked]], access: Access) -> None:
        self._engines = engines
        self._access = access
        self.collector = Collector(engines)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self.collector)
        self._fresh = Fresh()
        self._orders = asyncio.Semaphore(_ORDERS)
        #: Kept, since the loop has only weak references to its tasks.
        self._looks: set[asyncio.Task[None]] = set()

    def app(self) -> ASGIApp:
        """Return the application."""
        return _Guarded(
            Starlette(
                routes=[
                    *(Route(path, self._page) for path in _PAGE),
                    Route("/favicon.ico", self._nothing),
                    Route("/metrics", self._metrics),
                    Route("/livez", self._live),
                    Route("/healthz", self._live),
                    Route("/readyz", self._ready),
                    Route("/api/state", self._state),
                    Route("/api/order", self._order, methods=["POST"]),
                ]
            ),
            self._access,
        )

    # -- for probes and Prometheus ------------------------------------------------------------------------------

    async def _metrics(self, request: Request) -> Response:
        self._tell_look()
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        text = self._fresh.get(kind, lambda: encode(self._registry))
        return Response(text, headers={"Content-Type": kind})

    async def _live(self, _: Request) -> Response:
        return self._verdicts(lambda judged: judged.live)

    async def _ready(self, _: Request) -> Response:
        return self._verdicts(lambda judged: judged.ready)

    def _verdicts(self, good: Callable[[Verdict], bool]) -> Response:
        judged = [(looked, looked.verdict()) for looked in self._engines()]
        told = [
            {"domain": looked.engine.text("domain"), "live": each.live, "ready": each.ready, "why": each.why}
            for looked, each in judged
        ]
        bad = [each for _, each in judged if not good(each)]
        why = (bad or [each for _, each in judged])[0].why if judged else "no engine runs here"
        well = bool(judged) and not bad
        return _json({"ok": well, "why": why, "engines": told}, 200 if well else 503)

    # -- for people ---------------------------------------------------------------------------------------------

    async def _page(self, request: Request) -> Response:
        """Give a file of the page, which holds nothing of any engine; its script asks for the state."""
        if not self._access.shows_page:
            return _refused(403, _NEEDS_TOKEN)
        name, kind = _PAGE[request.url.path]
        return Response(_page_file(name), media_type=kind)

    async def _nothing(self, _: Request) -> Response:
        return Response(status_code=204)

    async def _state(self, request: Request) -> Response:
        """Give one engine's state; ``?engine=`` names it where there are several, as a TARGET of the command line."""
        if (why := self._denied(request)) is not None:
            return why
        self._tell_look()
        sight = self._sight(request)
        looked = self._meant(request, sight)
        if isinstance(looked, Response):
            return looked
        state = looked.state()
        if state is None:
            return _refused(503, f"the engine is of version {looked.engine.text('version')}, which is not this one's")
        return _json(state if sight is Sight.ALL else _shown(state))

    async def _order(self, request: Request) -> Response:
        """Pass an order on to an engine: the JSON object of its control socket."""
        sight = self._sight(request)
        if sight is not Sight.ALL:
            return _refused(401, "this is not the token" if sight is Sight.REFUSED else _NEEDS_TOKEN)
        looked = self._meant(request, sight)
        if isinstance(looked, Response):
            return looked
        try:
            order = json.loads(await asyncio.wait_for(_body(request), _BODY))
        except (ValueError, RecursionError, TimeoutError):
            order = None
        if not isinstance(order, dict) or not isinstance(order.get("do"), str) or order["do"] == "statistics":
            return _refused(400, 'an order is a JSON object: {"do": "stop"}')
        async with self._orders:
            try:
                answer = await asyncio.to_thread(looked.ask, order, _PATIENCE)
            except Unanswered as error:
                return _refused(409, str(error))
        return _json({**answer, "told": outcome(order, answer)})

    def _meant(self, request: Request, sight: Sight) -> Looked | Response:
        """Return the engine that a request means, or the answer that says why there is none."""
        target = request.query_params.get("engine")
        there = self._engines()
        found = [each for each in there if target is None or matches(each.engine, target)]
        if len(found) == 1:
            return found[0]
        if not there:
            return _refused(503, "no engine runs here")
        keys = ("domain", "pid") if sight is Sight.ALL else ("domain",)
        return _json(
            {
                "error": "no engine of that name runs here" if not found else "several engines run here: add ?engine=",
                "engines": [{key: each.engine.about.get(key) for key in keys} for each in there],
            },
            404 if not found else 409,
        )

    def _denied(self, request: Request) -> Response | None:
        """Return the refusal of a request that may see no more than metrics and health."""
        sight = self._sight(request)
        if sight is Sight.REFUSED:
            return _refused(401, "this is not the token")
        return _refused(403, _NEEDS_TOKEN) if sight is Sight.METRICS else None

    def _sight(self, request: Request) -> Sight:
        return self._access.sight(request.headers.get("authorization"))

    def _tell_look(self) -> None:
        """Have the engines count their queues for who looks, without waiting for it."""
        for looked in self._engines():
            if looked.look_is_due:
                task = asyncio.create_task(self._look(looked))
                self._looks.add(task)
                task.add_done_callback(self._looks.discard)

    async def _look(self, looked: Looked) -> None:
        async with self._orders:
            try:
                await asyncio.to_thread(looked.ask, {"do": "look"}, 1.0)
            except Unanswered:
                # The engine has ended, or stands still: what was not counted is absent.
                return


class _Guarded:
    """Refuses requests before anything else of them is read, and adds the headers of every answer."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}

        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        answer: ASGIApp = self._app
        if not self._access.takes(headers.get("host")):
            answer = _refused(421, "this server answers to localhost and its numbers alone")
        await answer(scope, receive, send_more)


async def _body(request: Request) -> bytes:
    """Read a request's body. Raises ``ValueError`` where it is too long."""
    found = bytearray()
    async for chunk in request.stream():
        found += chunk
        if len(found) > _ORDER:
            raise ValueError(f"more than {_ORDER} bytes")
    return bytes(found)


@functools.cache
def _page_file(name: str) -> bytes:
    return (Path(__file__).parent / "page" / name).read_bytes()


def _shown(state: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a state, and the notes that can be made of them alone."""
    shown: dict[str, Any] = numbers_only(state)
    add_notes(shown)
    return shown


def _json(value: Any, status: int = 200) -> Response:
    # "<" is written so that no browser takes the answer for a page, whatever it holds.
    text = json.dumps(value, allow_nan=False).replace("<", "\\u003c")
    return Response(text, status, media_type="application/json")


def _refused(status: int, why: str) -> Response:
    return _json({"error": why}, status)
