"""Lightning's ``Trainer`` over a pipeline."""

from dualpipe_ext.compat.lightning.module import DualPipeLightningModule
from dualpipe_ext.compat.lightning.strategy import DualPipeStrategy

__all__ = ["DualPipeLightningModule", "DualPipeStrategy"]
