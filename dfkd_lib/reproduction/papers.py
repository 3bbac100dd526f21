"""What a paper claims and published, and what our records say about it: what chapters ask for by a paper's id."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import unknown
from ..locations import book_root
from .cards import Paper, read_card
from .verdicts import Record, judge
from .verdicts import percent as percent  # chapters call these as papers.percent, ...
from .verdicts import seeds as seeds
from .verdicts import spread as spread
from .verdicts import spreads_of as spreads_of

if TYPE_CHECKING:
    import pandas as pd


def paper_ids() -> list[str]:
    """The papers that have a card."""
    return sorted(path.stem for path in (book_root() / "papers").glob("*.yml"))


def paper(id: str) -> Paper:
    """Read a paper card.

    Raises:
        InputError: there is no such card.
        DamagedFile: the card is malformed; the message names the file and the key.
    """
    known = paper_ids()
    if id not in known:
        raise unknown("paper", id, known)
    return read_card(book_root() / "papers" / f"{id}.yml")


def published(paper_id: str, table: str, dataset: str) -> pd.DataFrame:
    """One column of a published table: `method`, `mean`, `std`, as fractions; a reported failure is NaN."""
    import pandas as pd

    source = paper(paper_id).table(table)
    if dataset not in source.columns:
        raise unknown(f"dataset of {source.source}", dataset, source.columns)
    cells = {label: row[dataset] or (math.nan, None) for label, row in source.rows.items() if dataset in row}
    means = [mean for mean, _ in cells.values()]
    stds = [math.nan if std is None else std for _, std in cells.values()]
    return pd.DataFrame({"method": list(cells), "mean": means, "std": stds})


def claims_table(paper_id: str, records: Sequence[Record]) -> pd.DataFrame:
    """Each claim with the verdict of records that differ by seed: claim, where, verdict, figures."""
    import pandas as pd

    card = paper(paper_id)
    rows = []
    for claim in card.claims:
        verdict = judge(claim, records, card.budgets)
        rows.append((claim.text, claim.where, verdict.verdict, verdict.words))
    return pd.DataFrame(rows, columns=["claim", "where", "verdict", "figures"])
