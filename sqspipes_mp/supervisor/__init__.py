"""The supervisor, in the process that calls ``Engine.run`` or one of its own: starts, watches, restarts, stops."""
