"""Where things lie: this package, the cache, the data root, the book. All but the first can be moved by environment
variables."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


@cache
def code_fingerprint() -> str:
    """Hash of the library's source files, 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def cache_root() -> Path:
    """Teachers and other results worth keeping: `DFKD_CACHE`, or `dfkd` in the user's cache folder."""
    if chosen := os.environ.get("DFKD_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dfkd"


def data_root() -> Path:
    """Datasets as `<name>/<split>.npz`: `DFKD_DATA`, or `data` inside the cache."""
    chosen = os.environ.get("DFKD_DATA")
    return Path(chosen).expanduser() if chosen else cache_root() / "data"


def repository_root() -> Path | None:
    """The checkout that this package runs from, or None when it is an installed wheel."""
    return PACKAGE.parent if (PACKAGE.parent / "_toc.yml").is_file() else None


def book_root() -> Path:
    """Chapters, profiles, paper cards and results: `DFKD_BOOK`, the checkout's `book/`, or the wheel's copy."""
    if chosen := os.environ.get("DFKD_BOOK"):
        return Path(chosen).expanduser()
    root = repository_root()
    return root / "book" if root else PACKAGE / "_book"
