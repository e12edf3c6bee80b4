"""DualPipe over stages that FSDP2 keeps in shards: two pipelines of two ranks on this machine."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dualpipe_ext import DualPipe
from dualpipe_ext.testing import run_ranks

CHUNKS = 8


def criterion(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A micro-batch's part of the mean over one pipeline's batch; FSDP takes the mean of both."""
    return nn.functional.mse_loss(output, target) / CHUNKS


def train(number: int, size: int) -> None:
    """Train on one of `size` ranks: in each place of a pipeline, two hold half of every weight."""
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "pp"))
    rank, replica = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(2)]
    stages = [layers[rank], layers[1 - rank]]
    for stage in stages:
        fully_shard(stage, mesh=mesh["dp"])  # before the pipeline is made
    model = DualPipe(stages, process_group=mesh.get_group("pp"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(replica))
    x, y = data[rank], data[1 - rank].sin()  # half of the batch enters at each end
    for step in range(50):
        loss, _ = model.step(x, num_chunks=CHUNKS, criterion=criterion, labels=(y,))
        model.sync_gradients()
        model.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number == 0 and loss is not None and step % 10 == 9:
            print(f"step {step + 1}: loss {loss.sum():.4f}", flush=True)


if __name__ == "__main__":
    run_ranks(train, 4, ranks="processes")
