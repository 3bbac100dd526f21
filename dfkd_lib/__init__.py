"""Distilling Without Data: data-free knowledge distillation, one module per paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .distilled import Distilled
    from .distilling import distill
    from .distilling_text import DistilledText, distill_text
    from .reusing import amalgamate, graft
    from .transferring import select_layer, transferability
    from .zero_shot import QFSL, SelectiveClassifier

__all__ = [
    "QFSL",
    "Distilled",
    "DistilledText",
    "SelectiveClassifier",
    "amalgamate",
    "distill",
    "distill_text",
    "graft",
    "select_layer",
    "transferability",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the front door, and torch with it, when it is used: `import dfkd_lib` alone costs nothing."""
    if name in ("amalgamate", "graft"):
        from . import reusing

        return getattr(reusing, name)
    if name in ("select_layer", "transferability"):
        from . import transferring

        return getattr(transferring, name)
    if name in ("QFSL", "SelectiveClassifier"):
        from . import zero_shot

        return getattr(zero_shot, name)
    if name in ("DistilledText", "distill_text"):
        from . import distilling_text

        return getattr(distilling_text, name)
    if name in __all__:
        from . import distilling

        return getattr(distilling, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
