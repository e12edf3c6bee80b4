"""Cut a whole model into stages, train and evaluate it on four ranks, and put it together again."""

import tempfile

import torch
from torch import nn

from dualpipe_ext import DualPipe
from dualpipe_ext.testing import run_ranks


def whole_model() -> nn.Sequential:
    """The same weights on every rank."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(2) for layer in (nn.Linear(64, 64), nn.GELU())]
    return nn.Sequential(nn.Linear(8, 64), nn.GELU(), *hidden, nn.LayerNorm(64), nn.Linear(64, 1))


def train(rank: int, size: int, folder: str) -> float:
    """Train on one of `size` ranks; save its stage, and return its part of the last loss."""
    layers = whole_model()
    stages = [layers[2 * i : 2 * i + 2] for i in range(size)]  # their layers keep their names
    model = DualPipe([stages[rank], stages[size - 1 - rank]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = None
    for step in range(101):
        data = torch.randn(2, 128, 8, generator=torch.Generator().manual_seed(step))
        target = data.sin().sum(2, keepdim=True)
        x = {0: data[0], size - 1: data[1]}.get(rank)
        y = {0: target[1], size - 1: target[0]}.get(rank)
        with torch.set_grad_enabled(step < 100):  # the last batch is for evaluation
            loss, _ = model.step(x, num_chunks=16, criterion=nn.MSELoss(), labels=(y,))
        if step < 100:
            model.sync_gradients()
            optimizer.step()
            optimizer.zero_grad()
    torch.save(stages[rank].state_dict(), f"{folder}/stage{rank}.pt")  # one copy of each
    return 0.0 if loss is None else float(loss.sum()) / 16


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        losses = run_ranks(train, 4, ranks="processes", args=(folder,))
        saved = [torch.load(f"{folder}/stage{i}.pt") for i in range(4)]
    whole = whole_model()
    whole.load_state_dict({name: value for stage in saved for name, value in stage.items()})
    x = torch.randn(2, 128, 8, generator=torch.Generator().manual_seed(100))
    error = nn.functional.mse_loss(whole(x), x.sin().sum(2, keepdim=True))
    print(f"an unseen batch: loss {sum(losses):.5f} in the pipeline, {error:.5f} in one piece")
