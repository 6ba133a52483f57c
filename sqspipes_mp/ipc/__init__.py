"""Shared memory, frames and reports between the processes of an engine."""
