"""Runs where ``Engine.run`` was called (or in a process of its own): starts, watches, restarts, stops."""
