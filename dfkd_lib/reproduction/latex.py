"""The book's tables as LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .tables import Table


def document(tables: Sequence[Table]) -> str:
    """A LaTeX document of the tables; each stands between comments, ready to be taken into another document."""
    head = [
        r"\documentclass[10pt]{article}",
        r"\usepackage[utf8]{inputenc}",
        r"\usepackage[T1]{fontenc}",
        r"\usepackage{graphicx}",
        r"\usepackage[margin=2cm]{geometry}",
        r"\begin{document}",
    ]
    body = [_latex_table(table) + ("\n" + r"\clearpage" if i % 3 == 2 else "") for i, table in enumerate(tables)]
    return "\n".join([*head, *body, r"\end{document}"]) + "\n"


def _latex_table(table: Table) -> str:
    wide = table.kind == "claims"
    columns = "p{5.7cm}p{2.5cm}p{2cm}p{5.5cm}" if wide else "l" * len(table.frame.columns)
    lines = [" & ".join(map(_tex, row)) + r" \\" for row in table.frame.itertuples(index=False)]
    parts = [lines] if not wide else [lines[i : i + 8] for i in range(0, len(lines), 8)]  # a table cannot break
    heading = " & ".join(map(_tex, table.frame.columns)) + r" \\ \hline"
    text = []
    for part in parts:
        body = [rf"\begin{{tabular}}{{{columns}}}", heading, *part, r"\end{tabular}"]
        if not wide:
            natural = [
                r"\setbox0=\hbox{%",
                *body,
                r"}\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\box0}\else\box0\fi",
            ]
            body = natural
        caption = rf"\caption{{{_tex(table.caption)}}}"
        text += [f"% {table.caption}", r"\begin{table}[!htbp]\centering\small", caption, *body, r"\end{table}"]
    return "\n".join(text)


_TEX = {
    "\\": r"\textbackslash{}",
    **{c: "\\" + c for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "–": "--",
    "—": "---",
    "→": r"$\rightarrow$",
    "−": "$-$",
    "<": r"$<$",
    ">": r"$>$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "…": r"\dots{}",
    "√": r"$\surd$",
    **{letter: rf"$\{name}$" for letter, name in {
        "α": "alpha", "β": "beta", "γ": "gamma", "λ": "lambda", "ρ": "rho", "σ": "sigma", "τ": "tau", "ε": "epsilon",
    }.items()},
    "“": "``",
    "”": "''",
    "‘": "`",
    "’": "'",
    "\N{NO-BREAK SPACE}": "~",
}  # fmt: skip


def _tex(text: Any) -> str:
    return "".join(_TEX.get(c, c if ord(c) < 0x250 else "?") for c in str(text))
