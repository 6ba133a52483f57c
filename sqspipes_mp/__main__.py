"""``python -m sqspipes_mp``: the command line (its own process)."""

import sys

from sqspipes_mp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
