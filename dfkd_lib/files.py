"""Files appear whole or not at all; what is read has the shape that it must have; parallel runs take locks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import DamagedFile, DFKDError, InputError

PART = ".part"
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)  # a place that this user cannot write to


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the name `path`, on failure it vanishes.

    Whatever stood at `path` stays intact until the new file is complete and on disk.

    Raises:
        DFKDError: the file cannot be written (disk full, no permission).
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
        temporary = Path(name)
        os.close(handle)
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as e:
        kept = "; the earlier version is intact" if path.exists() else ""
        raise DFKDError(f"cannot write {path}: {e.strerror or e}{kept}") from e
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that killed processes left in a folder which nobody else is writing to."""
    for leftover in folder.rglob(f".*{PART}"):
        leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON. NaN and infinity are refused, as JSON does not know them."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, shape: Any = object, remedy: str = "delete it to have it written anew") -> Any:
    """Read a JSON file that this project wrote.

    Args:
        remedy: what to do about a damaged one.
        shape: what must stand in it. A type; `float` takes whole numbers too. A mapping from keys to shapes: these
            keys must be there, those that end in `?` may be, others are not looked at; `{str: shape}` holds for every
            value. A list of one shape, for every element. A tuple of shapes: one of them.

    Raises:
        DamagedFile: it cannot be read or parsed, or has another shape; the message names the place in it.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise DamagedFile(f"{path} is not valid JSON ({e}); {remedy}") from e
    except OSError as e:
        raise DamagedFile(f"cannot read {path}: {e.strerror or e}") from e
    if wrong := misfit(value, shape):
        raise DamagedFile(f"{path} is damaged: {wrong}; {remedy}")
    return value


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def misfit(value: Any, shape: Any, at: str = "it") -> str:
    """Where and how a value departs from a shape, as `read_json` takes it; empty if it does not."""
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{at} must be a list"
        parts = [(item, shape[0], f"{at}[{i}]") for i, item in enumerate(value)]
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{at} must be a mapping"
        if str in shape:
            parts = [(item, shape[str], f"{at}[{key!r}]") for key, item in value.items()]
        else:
            if missing := [key for key in shape if not key.endswith("?") and key not in value]:
                return f"{at} lacks {missing[0]!r}"
            known = {key.removesuffix("?"): inner for key, inner in shape.items()}
            parts = [(item, known[key], f"{at}[{key!r}]") for key, item in value.items() if key in known]
    elif isinstance(shape, tuple):
        wrong = [misfit(value, option, at) for option in shape]
        return "" if "" in wrong else " or ".join(dict.fromkeys(wrong))
    else:
        allowed = (float, int) if shape is float else shape
        fits = isinstance(value, allowed) and (type(value) is not bool or shape in (bool, object))
        return "" if fits else f"{at} must be {'null' if shape is type(None) else shape.__name__}"
    return next(filter(None, (misfit(*part) for part in parts)), "")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def output_folder(path: Path | str) -> Path:
    """The absolute path of a folder to write into, which is made if it is not there.

    Raises:
        InputError: there can be no such folder, or this user cannot write to it.
    """
    try:
        if not os.fspath(path):
            raise ValueError("its path is empty")
        folder = Path(path).expanduser().resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, RuntimeError, TypeError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else e
        raise InputError(f"cannot write into folder {str(path)[:200]}: {why}; choose another") from e
    return folder


@contextmanager
def lock(path: Path, *, timeout: float = -1, what: str = "it") -> Iterator[None]:
    """Hold an exclusive lock file; it is released when the process ends, however it ends.

    Where this user cannot write, there is nothing to guard and no lock is taken: a read-only cache can be read.

    Args:
        timeout: seconds to wait; negative waits for ever.
        what: the thing that is locked, for the message.

    Raises:
        DFKDError: another process holds the lock for longer than `timeout`, or a lock cannot be had there.
    """
    held = FileLock(path, timeout=timeout)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except Timeout as e:
        raise DFKDError(f"{what} is in use by another process (lock {path}); wait for it or choose another") from e
    except (OSError, NotImplementedError) as e:
        if not (isinstance(e, OSError) and e.errno in _CLOSED):
            raise DFKDError(f"cannot lock {path}: {getattr(e, 'strerror', None) or e}") from e
    try:
        yield
    finally:
        held.release()
