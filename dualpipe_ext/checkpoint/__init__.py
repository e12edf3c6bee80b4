"""Checkpoints, saved on one number of ranks and loaded on any other, or by an unsplit model."""

from dualpipe_ext.checkpoint.folders import latest_checkpoint
from dualpipe_ext.checkpoint.huggingface import export_pretrained, import_pretrained
from dualpipe_ext.checkpoint.load import Resumed, load_checkpoint
from dualpipe_ext.checkpoint.save import save_checkpoint

__all__ = [
    "Resumed",
    "export_pretrained",
    "import_pretrained",
    "latest_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]
