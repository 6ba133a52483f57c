"""The same hop as a program of each peer: what ``benchmarks.peers`` starts. Each needs its peer; none is imported."""
