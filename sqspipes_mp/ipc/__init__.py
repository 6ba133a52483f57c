"""What the processes of an engine share and say to each other."""
