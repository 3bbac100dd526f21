"""Distilling Without Data: data-free knowledge distillation, one module per paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .distilling import Distilled, distill
    from .reusing import amalgamate, graft

__all__ = ["Distilled", "amalgamate", "distill", "graft"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the front door, and torch with it, when it is used: `import dfkd_lib` alone costs nothing."""
    if name in ("amalgamate", "graft"):
        from . import reusing

        return getattr(reusing, name)
    if name in __all__:
        from . import distilling

        return getattr(distilling, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
