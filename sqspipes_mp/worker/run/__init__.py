"""Running the function over messages."""
