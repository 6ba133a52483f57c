"""The page of a running engine, in a real browser: its numbers, its orders, and that nothing on it is markup."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sqspipes_mp import Task, current_message
from sqspipes_mp.ipc.running.units import short_time
from tests.browser import Browser, browser, needs_browser
from tests.gates import Background, Gate, Log, engine_at, eventually, feed, values
from tests.process.test_http import Server, observers, served, sink, source

pytestmark = [needs_browser, pytest.mark.once]

#: Text that would be markup, would turn the direction of what follows, and would move a terminal's cursor.
EVIL = "<img src=x onerror=document.title='hacked'>\u202e\x1b[2J"


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQSPIPES_RUN_DIR", str(tmp_path / "registry"))
    monkeypatch.setenv("SQSPIPES_HTTP_TOKEN", "the token")


@pytest.fixture
def tab() -> Iterator[Browser]:
    with browser() as started:
        yield started


def held(value: object, gate: Gate, log: Log) -> object:
    current_message().progress(0.25, EVIL)
    log.note(value)
    gate.wait()
    return value


def shown(tab: Browser, server: Server) -> None:
    tab.open(f"http://{server.address}/")
    tab.until("document.body !== null && document.body.dataset.state === 'shown'")


def cell(name: str) -> str:
    """Return an expression for the text of a row of the first stage's box."""
    rows = "[...document.querySelectorAll('#stages dt')]"
    return f"{rows}.find((each) => each.textContent === '{name}').nextSibling.textContent"


def test_it_shows_true_numbers_as_text_takes_orders_with_the_token_and_outlives_everything(
    tab: Browser, db: Path, gate: Gate, log: Log
) -> None:
    engine = engine_at(db, [source, Task(held, name="work", args=(gate, log)), sink])
    feed(engine, "work", ["a", "b", "c"])
    with Background(engine, only="work", http="127.0.0.1:0") as run:
        log.wait_for(1)
        server = served()
        tab.size(360, 740)
        tab.open(f"http://{server.address}/")
        tab.js("sessionStorage.clear()")
        shown(tab, server)
        # Without the token: numbers, no texts, no orders.
        tab.until(f"/^[012]$/.test({cell('waiting')})")
        assert tab.js(cell("running")).startswith("1, longest")
        assert tab.js("document.querySelector('#workers').textContent").startswith("work[0]busy")
        assert "onerror" not in tab.js("document.body.textContent")
        assert tab.js("[...document.querySelectorAll('.orders')].every((each) => each.hidden)")
        assert tab.js("document.querySelector('#stop').hidden")
        for dark in (True, False):
            tab.dark(dark)
            # Nothing is wider than a phone.
            assert tab.js("document.documentElement.scrollWidth") == 360

        # By the keyboard alone: to the token's button, its text, OK.
        for _ in range(20):
            if tab.js("document.activeElement.id") == "token":
                break
            tab.press("Tab", 9)
        tab.press("Enter", 13, "\r")
        tab.until("document.querySelector('#ask').open && document.activeElement.id === 'ask-value'")
        tab.call("Input.insertText", text="the token")
        tab.press("Enter", 13, "\r")
        tab.until("!document.querySelector('#stop').hidden")
        tab.until("document.querySelector('#workers').textContent.includes('onerror')")
        assert tab.js("document.images.length") == 0
        assert "\\u202e\\u001b[2J" in tab.js("document.querySelector('#workers').textContent")
        assert tab.js("document.title").startswith("t ")

        # Times look as in top.
        times = [0, 1.5e-5, 0.0009996, 0.45, 0.9996, 9.94, 9.96, 59.6, 184, 3599.7, 7500, 273_600, 31_449_600]
        assert tab.js(f"{times}.map(time)") == [short_time(seconds) for seconds in times]

        tab.js("document.querySelector('#stages .orders button').click()")
        tab.until("document.querySelector('#stack-text').textContent.includes('in wait')")
        assert tab.js("document.querySelector('#stack-text details').open")

        # An order is acknowledged, presses add up, and the notes are those of top.
        plus = "document.querySelector('#stages .orders').lastChild"
        tab.js(f"{plus}.click(); {plus}.click(); {plus}.click()")
        tab.until("document.querySelector('#said').textContent.startsWith('work: 4 workers')")
        tab.until(f"{cell('workers')} === '4/4'")
        tab.js("document.querySelectorAll('#stages .orders button')[1].click()")
        tab.until("document.querySelector('#said').textContent.startsWith('work is paused')")
        tab.until("document.querySelector('#notes').textContent.includes('sqspipes-mp resume t --stage work')")
        tab.until("document.querySelector('#verdict').textContent.includes('but work is paused')")
        tab.js("document.querySelectorAll('#stages .orders button')[1].click()")
        tab.until("document.querySelector('#notes').childElementCount === 0")

        # No button moves, and none is there for a call that is over soon.
        cancel = "document.querySelector('#workers button:last-child')"
        tab.until(f"!{cancel}.disabled")
        tab.js(f"{cancel}.click()")
        tab.until("document.querySelector('#ask').open")
        assert "Cancel the call of work[0], which runs for" in tab.js("document.querySelector('#ask').textContent")
        # Enter is no yes.
        tab.press("Enter", 13, "\r")
        tab.until("!document.querySelector('#ask').open")

        # It rests while nobody sees it; a browser without a screen hides no tab by itself.
        tab.js("Object.defineProperty(document, 'visibilityState', {get: () => window.seen || 'hidden'})")
        tab.js("document.dispatchEvent(new Event('visibilitychange'))")
        tab.js("new Promise((resolve) => setTimeout(resolve, 300))")
        before = len(tab.requested)
        tab.js("new Promise((resolve) => setTimeout(resolve, 2500))")
        assert len(tab.requested) == before
        tab.js("window.seen = 'visible'; document.dispatchEvent(new Event('visibilitychange'))")
        eventually(lambda: tab.js("1") and len(tab.requested) >= before + 2, "it looks again")

        # The process that serves is killed: the page goes on.
        observers()[0].kill()
        eventually(lambda: tab.js("document.body.dataset.state") in {"shown", "trouble"}, "a look")
        tab.until("document.body.dataset.state === 'shown'")

        tab.js("document.querySelector('#stop').click()")
        tab.until("document.querySelector('#ask').open")
        tab.press("Tab", 9)
        tab.press("Enter", 13, "\r")
        eventually(lambda: server.json("/readyz")["why"] == "the run is ending", "the order was carried out")
        gate.open()
    assert run.summary.reason == "stopped"
    assert len(values(engine, "sink")) == 3
    tab.until("document.body.dataset.state === 'trouble'")
    assert "has ended" in tab.js("document.querySelector('#trouble').textContent")
    assert tab.js("[...document.querySelectorAll('main button')].every((each) => each.disabled)")
    # Nothing came from elsewhere, and the browser's own checks found nothing.
    assert {url.split("/")[2] for url in tab.requested if not url.startswith("about:")} == {server.address}
    blamed = [each for each in tab.complaints if "Failed to load resource" not in each]
    assert blamed == []
