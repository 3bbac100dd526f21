"""How the command words what it prints beside its results."""

from __future__ import annotations

import os
import sys


def coloured(text: str, colour: str) -> str:
    """Text for stderr, in colour where that is a terminal and nobody has asked for none (NO_COLOR)."""
    wanted = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    return f"\x1b[{colour}m{text}\x1b[0m" if wanted else text
