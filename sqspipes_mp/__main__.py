"""``python -m sqspipes_mp``, and the program ``sqspipes-mp``: the command line (the command line's process)."""

import sys


def main() -> int:
    """Run the command line of this process's arguments; return the exit code."""
    if sys.argv[1:2] == ["health"]:
        # Probes run it every few seconds, so that it loads nothing of the rest.
        from sqspipes_mp.cli.health import main as health  # noqa: PLC0415

        return health(sys.argv[2:])
    from sqspipes_mp.cli.main import main as others  # noqa: PLC0415

    return others()


if __name__ == "__main__":
    sys.exit(main())
