"""Receiving messages ahead of the function."""
