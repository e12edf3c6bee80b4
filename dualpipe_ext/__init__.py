"""DualPipe: bidirectional pipeline parallelism for PyTorch on a native engine."""

import torch  # noqa: F401  (its libraries must be loaded before the extension)

from dualpipe_ext._native import load_extension, runs_as_command

__version__ = "0.1.0"

if not runs_as_command():
    load_extension()
