"""The engines and stages that a person may mean by a name (the command line's process)."""

from __future__ import annotations

from collections.abc import Sequence

from sqspipes_mp.cli.exits import Refused
from sqspipes_mp.ipc.running.folders import Engine
from sqspipes_mp.ipc.running.served import Served
from sqspipes_mp.messages.hint import hint


def stages_here(engine: Engine) -> list[str]:
    """Return the names of the stages that run there; empty: the description does not tell. Raises ``Unanswered``."""
    if isinstance(engine, Served):
        return [str(stage["name"]) for stage in engine.state()["stages"]]
    selected, names = engine.about.get("selected"), engine.stages
    indexes = selected if isinstance(selected, list) else range(len(names))
    return [names[index] for index in indexes if isinstance(index, int) and 0 <= index < len(names)]


def stage_meant(engine: Engine, name: object) -> object:
    """Return the stage that a person means; None: the only one. Raises ``Refused`` and ``Unanswered``."""
    names = stages_here(engine)
    if name is None and len(names) == 1:
        return names[0]
    if name is None:
        raise Refused(f"several tasks run here, name one by --stage: {', '.join(names)}")
    if names and name not in names:
        raise Refused(
            f"--stage must be a task that runs here, one of {', '.join(names)}, got {name!r}{hint(name, names)}"
        )
    return name


def engine_hint(target: str, engines: Sequence[Engine]) -> str:
    """Return the engine that a mistyped TARGET may mean, as a question; empty: none comes near."""
    domains = [engine.text("domain") for engine in engines]
    # A script that runs its engine has no MODULE:ENGINE; its module is often called as its domain.
    return hint(target, [*domains, *(engine.text("target") for engine in engines)]) or hint(
        target.split(":", maxsplit=1)[0], domains
    )
