"""The version of the package (any process)."""

__version__ = "0.1.1"
