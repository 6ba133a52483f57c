"""The demo: a pipeline over a tree of Python files."""
