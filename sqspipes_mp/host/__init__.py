"""What this machine allows: CPUs, memory, clocks, numeric threads."""
