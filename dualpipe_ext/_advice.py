"""Warnings that point at the line of the user's code that led to them."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn_caller"]


def warn_caller(text: str) -> None:
    """Warns, pointing at the nearest caller outside this package."""
    level = 1
    frame = sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("dualpipe_ext."):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)
