"""Hugging Face's ``Trainer`` over a pipeline."""

from dualpipe_ext.compat.huggingface.trainer import DualPipeTrainer

__all__ = ["DualPipeTrainer"]
