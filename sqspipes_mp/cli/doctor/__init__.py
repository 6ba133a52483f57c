"""``sqspipes-mp doctor``: facts are gathered by thin edges, judged by pure checks (the command line's process)."""
