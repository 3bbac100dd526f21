"""What chapters show besides figures: library source, markup, and tables of figures. Outside of a notebook, nothing."""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..training.progress import in_notebook

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class HTML:
    """Markup, which a notebook renders."""

    data: str

    def _repr_html_(self) -> str:
        return self.data

    def __repr__(self) -> str:
        return "<IPython.core.display.HTML object>"  # the name that stored outputs know it by


def show(shown: Any, **options: Any) -> None:
    """Show something in a notebook, with the options of IPython's `display`."""
    if in_notebook():
        from IPython.display import display

        display(shown, **options)


def show_source(*objects: Any) -> None:
    """Show the source of functions and classes as it stands in the library, without their docstrings."""
    blocks = [_without_docstring(textwrap.dedent(inspect.getsource(thing))) for thing in objects]
    code = "\n\n".join(blocks)
    show({"text/plain": code, "text/markdown": f"```python\n{code}\n```"}, raw=True)


def _without_docstring(source: str) -> str:
    import ast

    lines = source.rstrip().split("\n")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            quoted = node.body[0]
            for i in range(quoted.lineno - 1, quoted.end_lineno or quoted.lineno):
                lines[i] = "\0"
    return "\n".join(line for line in lines if line != "\0")


def percent(value: float | None, spread: float | None = None, digits: int = 1) -> str:
    """A fraction as percent, "98.3" or "98.3 ± 0.2"; a missing one as "-"."""
    if value is None or math.isnan(value):
        return "-"
    return f"{100 * value:.{digits}f}" + (f" ± {100 * spread:.{digits}f}" if spread is not None else "")


def table(rows: Mapping[str, Mapping[str, str]], index: str = "") -> pd.DataFrame:
    """A table of texts, one row per key, in the order given; what is missing is "-".

    Args:
        index: heading of the first column.
    """
    import pandas as pd

    return pd.DataFrame.from_dict(rows, orient="index").fillna("-").rename_axis(columns=index)
