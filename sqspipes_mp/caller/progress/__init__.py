"""The progress display."""
