"""Training with dropout as ranks that are processes, whose masks are noted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader

from dualpipe_ext import DualPipeConfig, TrainingWrapper

WIDTH = 64
Masks = list[tuple[bool, ...]]


class NotedDropout(nn.Dropout):
    """Notes what it drops of each micro-batch."""

    def __init__(self, masks: Masks) -> None:
        super().__init__()
        self.masks = masks

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = super().forward(torch.ones_like(x))
        self.masks.append(tuple((kept[0] != 0).tolist()))
        return x * kept


def make(masks: Masks) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(WIDTH, WIDTH), NotedDropout(masks)) for _ in range(4))
    return nn.Sequential(*blocks)


def train(rank: int, size: int, num_replicas: int, seed: int | None) -> dict[str, Any]:
    """Two epochs over batches that a loader draws; every rank has a loader."""
    masks: Masks = []
    model = make(masks)
    ranks = size // num_replicas
    mesh = init_device_mesh("cpu", (num_replicas, ranks), mesh_dim_names=("dp", "pp"))
    config = DualPipeConfig(num_stages=ranks, num_microbatches=2 * ranks, seed=seed, timeout=30.0)
    wrapper = TrainingWrapper(model, config, loss_fn=nn.functional.mse_loss, mesh=mesh)
    rows = torch.arange(16.0)[:, None].expand(-1, WIDTH)
    loader: Any = DataLoader(rows.contiguous(), batch_size=8, shuffle=True)  # type: ignore[arg-type]
    losses = [float(wrapper.train_step((x, x))) for _ in range(2) for x in loader]
    drawn = torch.rand(())
    wrapper.predict(rows)
    return {"masks": masks, "losses": losses, "drawn": float(drawn), "next": float(torch.rand(()))}


def train_both(rank: int, size: int) -> list[dict[str, Any]]:
    """One pipeline without a seed of its own, then two side by side with one."""
    return [train(rank, size, 1, None), train(rank, size, 2, 7)]


def go_on(rank: int, size: int, folder: Path) -> dict[str, Masks]:
    """Of two replicas: what is dropped after a save; again, resumed by a script seeded otherwise."""
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "pp"))
    rows = torch.arange(16.0)[:, None].expand(-1, WIDTH).contiguous()
    found: dict[str, Masks] = {}
    for name in ("saved", "resumed"):
        masks: Masks = []
        model = make(masks)
        torch.manual_seed(1 if name == "saved" else 2)
        config = DualPipeConfig(num_microbatches=size, timeout=30.0)
        wrapper = TrainingWrapper(model, config, loss_fn=nn.functional.mse_loss, mesh=mesh)
        if name == "saved":
            wrapper.train_step((rows, rows))
            wrapper.save_checkpoint(folder)
        else:
            wrapper.load_checkpoint(folder)
        masks.clear()
        wrapper.train_step((rows, rows))
        found[name] = masks
    return found
