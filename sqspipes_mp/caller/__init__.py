"""The process that calls run(), map() or put()."""
