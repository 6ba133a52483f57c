"""An exception on its way to another process."""
