"""Train a model of your own with DualPipe, four ranks on this machine."""

import torch
from torch import nn

from dualpipe_ext import DualPipe
from dualpipe_ext.testing import run_ranks

CHUNKS = 16


def criterion(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A micro-batch's part of the mean over the batch, for gradients are added up."""
    return nn.functional.mse_loss(output, target) / CHUNKS


def train(rank: int, size: int) -> None:
    """Train on one of `size` ranks."""
    stages = [nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(2)]
    model = DualPipe(stages)  # stages rank and size-1-rank; copies are made equal
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
    x = {0: data[0], size - 1: data[1]}.get(rank)  # half of the batch enters at each end
    y = {0: data[1].sin(), size - 1: data[0].sin()}.get(rank)  # and leaves at the other
    for step in range(100):
        loss, _ = model.step(x, num_chunks=CHUNKS, criterion=criterion, labels=(y,))
        model.sync_gradients()
        model.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and loss is not None and step % 20 == 19:
            print(f"step {step + 1}: loss {2 * loss.sum():.4f}", flush=True)  # of its half


if __name__ == "__main__":
    run_ranks(train, 4, ranks="processes")
