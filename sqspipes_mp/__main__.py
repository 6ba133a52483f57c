"""``python -m sqspipes_mp``: the command line (the command line's process)."""

import sys

from sqspipes_mp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
