"""What one rank tells the others of an exception that the user's code raised."""

from __future__ import annotations

import os
import traceback
from types import TracebackType

import torch

__all__ = ["describe"]

LIBRARIES = tuple(os.path.join(os.path.dirname(file), "") for file in (__file__, torch.__file__))
MAX_FRAMES = 8


def describe(error: BaseException, trace: TracebackType | None) -> str:
    """Its type and words, and the user's own lines that led to it, the innermost first."""
    text = "".join(traceback.format_exception_only(type(error), error)).strip()
    frames = traceback.extract_tb(trace)[::-1]
    own = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)]
    lines = [f"\n  {f.filename}({f.lineno}): {f.name}" for f in own[:MAX_FRAMES] or frames[:1]]
    return f"{text}\n\nAt:{''.join(lines)}" if lines else text
