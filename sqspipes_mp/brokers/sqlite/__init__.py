"""One SQLite file behind the port."""

from sqspipes_mp.brokers.sqlite.broker import SQLite as SQLite
