"""Train a model of your own with DualPipe, four ranks on this machine."""

import torch
from torch import nn

from dualpipe_ext import DualPipe
from dualpipe_ext.testing import run_ranks


def make_stage() -> nn.Module:
    """Return a stage: any module whose output the next stage takes as its input."""
    return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))


def train(rank: int, num_ranks: int) -> None:
    """Train on one rank: it holds stages ``rank`` and ``num_ranks - 1 - rank``."""
    model = DualPipe([make_stage(), make_stage()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
    inputs = {0: data[0], num_ranks - 1: data[1]}  # half the batch enters at each end
    labels = {0: data[1].sin(), num_ranks - 1: data[0].sin()}  # and leaves at the other
    for step in range(1, 101):
        loss, _ = model.step(
            inputs.get(rank),
            num_chunks=16,
            criterion=nn.functional.mse_loss,
            labels=(labels.get(rank),),
            sync_gradients=True,
        )
        model.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and loss is not None and step % 20 == 0:
            print(f"step {step}: loss {loss.mean():.4f}", flush=True)


if __name__ == "__main__":
    run_ranks(train, 4, ranks="processes")
