"""The keeper's process alone: creates queues, extends leases, judges the leases of dead workers."""
