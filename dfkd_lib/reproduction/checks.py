"""What every change must pass: `make test`."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from ..errors import DFKDError, InputError
from ..locations import repository_root
from .notebooks import stored_notebooks
from .site import build_stored

_PARALLEL = ["-q", "-n", "2", "--dist", "loadscope"]


def check() -> list[str]:
    """Run all steps, each to its end; returns the names of those that failed.

    Raises:
        InputError: there is no checkout to check.
    """
    root = repository_root()
    if root is None:
        raise InputError("the tests belong to a checkout of the repository; this is an installed package")
    steps = {
        "lint": ["ruff", "check", "."],
        "types": ["mypy"],
        "tests": ["pytest", "tests", *_PARALLEL],
        "notebooks": ["pytest", "--nbval", *map(str, stored_notebooks()), *_PARALLEL],
    }
    # One thread each: two processes at a time, and the same last digits as when the outputs were stored.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    failed = []
    for name, words in {**steps, "book": []}.items():
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        if words:
            ok = not subprocess.run([sys.executable, "-m", *words], cwd=root, env=environment).returncode
        else:
            ok = _book_builds()
        print(f"== {name}: {'passed' if ok else 'FAILED'}, {time.perf_counter() - start:.0f} s", flush=True)
        failed += [] if ok else [name]
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return failed


def _book_builds() -> bool:
    try:
        build_stored(strict=True)
    except DFKDError as e:
        print(e)
        return False
    return True
