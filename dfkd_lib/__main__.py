"""`python -m dfkd_lib` is the `dfkd` command."""

import sys

from .reproduction.cli import main

if __name__ == "__main__":
    sys.exit(main())
