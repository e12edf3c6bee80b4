"""Trains with DualPipe from other libraries' trainers.

``DualPipeTrainer`` needs the extra ``transformers``, ``DualPipeLightningModule`` and
``DualPipeStrategy`` the extra ``lightning``; each is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualpipe_ext.compat.huggingface import DualPipeTrainer
    from dualpipe_ext.compat.lightning import DualPipeLightningModule, DualPipeStrategy

__all__ = ["DualPipeLightningModule", "DualPipeStrategy", "DualPipeTrainer"]

_HOMES = {
    "DualPipeLightningModule": ("dualpipe_ext.compat.lightning", "lightning"),
    "DualPipeStrategy": ("dualpipe_ext.compat.lightning", "lightning"),
    "DualPipeTrainer": ("dualpipe_ext.compat.huggingface", "transformers"),
}
_NEEDED = {"lightning": ("lightning",), "transformers": ("transformers", "accelerate")}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, extra = _HOMES[name]
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _NEEDED[extra]:
            raise
        raise ImportError(
            f"{name} needs {package}, which is not installed: pip install "
            f"'dualpipe_ext[{extra}]', or pip install '.[{extra}]' in the source folder"
        ) from error
