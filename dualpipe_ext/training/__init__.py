"""Trains a whole model over a pipeline, with the results of training it in one piece."""

from dualpipe_ext.training.losses import cross_entropy, next_token_loss
from dualpipe_ext.training.sampler import ReplicaBatchSampler, collate_rows
from dualpipe_ext.training.setup import setup_dual_pipe
from dualpipe_ext.training.wrapper import TrainingWrapper

__all__ = [
    "ReplicaBatchSampler",
    "TrainingWrapper",
    "collate_rows",
    "cross_entropy",
    "next_token_loss",
    "setup_dual_pipe",
]
