"""The main functions of workers and keeper, for the supervisor, which may not import their folders (caller)."""

from __future__ import annotations

from sqspipes_mp.keeper.main import keeper_main
from sqspipes_mp.supervisor.children import Mains
from sqspipes_mp.worker.main import worker_main

MAINS = Mains(worker=worker_main, keeper=keeper_main)
