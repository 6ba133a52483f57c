"""Sending outputs, then deleting their input."""
