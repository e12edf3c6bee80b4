"""Exceptions of a step: who caused them, and how they are described to the other ranks."""

from __future__ import annotations

import os
import traceback
from types import TracebackType

import torch
from torch import nn

from dualpipe_ext._C import InternalError, PipelineError
from dualpipe_ext._step import Step

__all__ = ["describe", "is_the_stages"]

LIBRARIES = tuple(os.path.join(os.path.dirname(file), "") for file in (__file__, torch.__file__))
MAX_FRAMES = 8


def describe(error: BaseException, trace: TracebackType | None) -> str:
    """Describes an error: type, text, and the user's own lines that led to it, innermost first."""
    text = "".join(traceback.format_exception_only(type(error), error)).strip()
    frames = traceback.extract_tb(trace)[::-1]
    own = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)]
    lines = [f"\n  {f.filename}({f.lineno}): {f.name}" for f in own[:MAX_FRAMES] or frames[:1]]
    return f"{text}\n\nAt:{''.join(lines)}{_layer(trace)}" if lines else text


def _layer(trace: TracebackType | None) -> str:
    """Names the innermost module that was called, within the outermost: the layer of a stage.

    The forward of a stage that was cut out of a model is generated code, whose lines say nothing.
    """
    called: list[nn.Module] = []
    while trace is not None:
        # Of these frames alone: a frame keeps the locals that were asked for, and in one that
        # handles the error, these would keep the error and its frames alive.
        if trace.tb_frame.f_code is nn.Module._call_impl.__code__:
            called.append(trace.tb_frame.f_locals["self"])
        trace = trace.tb_next
    if not called or called[-1] is called[0]:
        return ""
    stage, layer = called[0], called[-1]
    names = [name for name, module in stage.named_modules() if module is layer]
    return f"\n  in {names[0]} ({type(layer).__name__})" if names else ""


def is_the_stages(error: BaseException, step: Step) -> bool:
    """Whether a stage failed, rather than the caller or this library."""
    if not isinstance(error, Exception) or isinstance(error, InternalError):
        return False
    if error is step.mistake:
        return False
    ours = isinstance(error, (ValueError, TypeError, PipelineError))
    return error is step.error or not ours or _was_raised_in_python(error)


def _was_raised_in_python(error: BaseException) -> bool:
    """Whether the user's code raised it below the engine, in a backward or a hook of torch.

    The traceback of what the engine itself raises has only the frame that called the engine.
    """
    return error.__traceback__ is not None and error.__traceback__.tb_next is not None
