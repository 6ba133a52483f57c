"""One message on the wire: envelope, ids, failures, attempts. Pure."""
