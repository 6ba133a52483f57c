"""Runs where ``Engine.run`` was called (``iterate=True``: in a process of its own): starts, watches, restarts, stops."""
