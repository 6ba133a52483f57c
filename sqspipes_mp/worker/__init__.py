"""Runs in worker processes only: receive, run the user function, send, delete."""
