"""`python -m shardsurgeon`: the command line, wherever the console script is not on the path."""

from __future__ import annotations

import sys

from shardsurgeon.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
