"""The limits of this machine: CPUs, memory, clocks, forks, numeric threads."""
