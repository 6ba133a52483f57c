"""The HTTP process: metrics, health and state of running engines, read from their statistics alone."""
