"""Where things lie: this package, the cache, the data root, the book. All but the first can be moved by environment
variables."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

from .errors import InputError

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
    if chosen := _chosen("DFKD_CACHE"):
        return chosen
    if base := os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "dfkd"
    try:
        return Path.home() / ".cache" / "dfkd"
    except RuntimeError as e:
        raise InputError("this user has no home folder for a cache; set DFKD_CACHE to a folder") from e


def data_root() -> Path:
    """Datasets as `<name>/<split>.npz`: `DFKD_DATA`, or `data` inside the cache."""
    return _chosen("DFKD_DATA") or cache_root() / "data"


def repository_root() -> Path | None:
    """The checkout that this package runs from, or None when it is an installed wheel."""
    return PACKAGE.parent if (PACKAGE.parent / "_toc.yml").is_file() else None


def book_root() -> Path:
    """Chapters, profiles, paper cards and results: `DFKD_BOOK`, the checkout's `book/`, or the wheel's copy."""
    if chosen := _chosen("DFKD_BOOK"):
        return chosen
    root = repository_root()
    return root / "book" if root else PACKAGE / "_book"


def _chosen(variable: str) -> Path | None:
    """The folder that an environment variable names, if it is set."""
    text = os.environ.get(variable)
    try:
        return Path(text).expanduser() if text else None
    except RuntimeError as e:
        raise InputError(f"{variable} is {text}, and there is no such user; correct it") from e
