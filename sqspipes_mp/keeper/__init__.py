"""Runs in the keeper process only: creates queues, keeps leases, judges what dead workers left."""
