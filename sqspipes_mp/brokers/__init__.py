"""The outside world: one module per queue service behind the port in ``base``."""
