"""What every change must pass: `make test`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from ..errors import DFKDError, InputError
from ..locations import repository_root
from .notebooks import stored_notebooks
from .site import build_stored

_PARALLEL = ["-q", "-n", "2", "--dist", "loadscope", "--durations", "15"]


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
        "tests": ["pytest", "tests", *_PARALLEL],
        "notebooks": ["pytest", "--nbval", *map(str, stored_notebooks()), *_PARALLEL],
        "book": [],
    }
    # One thread each: two processes at a time, and the same last digits as when the outputs were stored.
    options: Any = {"cwd": root, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    failed = []
    # The types take a minute or two of one core, and the other steps leave one idle now and then.
    types = subprocess.Popen([sys.executable, "-m", "mypy"], stdout=subprocess.PIPE, text=True, **options)
    for name, words in steps.items():
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        ok = not subprocess.run([sys.executable, "-m", *words], **options).returncode if words else _book_builds()
        print(f"== {name}: {'passed' if ok else 'FAILED'}, {time.perf_counter() - start:.0f} s", flush=True)
        failed += [] if ok else [name]
    print("== types", flush=True)
    print(types.communicate()[0], end="")
    print(f"== types: {'FAILED' if types.returncode else 'passed'}, beside the other steps", flush=True)
    failed += ["types"] if types.returncode else []
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return failed


def _book_builds() -> bool:
    try:
        build_stored(strict=True)
    except DFKDError as e:
        print(e)
        return False
    return True
