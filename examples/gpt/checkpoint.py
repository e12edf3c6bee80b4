"""One file for a run, independent of how many ranks and which schedule wrote it.

Weights and optimizer state are stored under the names that parameters have in the whole model,
each once. Rank 0 writes the file, first under another name, so that it is whole or not there.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpt.models import PipelinedGPT
from gpt.options import Options
from gpt.training import Training

Checkpoint = dict[str, Any]


def gather(training: Training) -> Checkpoint | None:
    """Collect the whole run on rank 0; ``None`` on the others."""
    own = {
        "model": _own_weights(training),
        "optimizer": _own_optimizer_state(training),
        "rng": torch.get_rng_state(),
    }
    by_rank: list[Any] | None = None
    if dist.get_rank() == 0:
        by_rank = [None] * dist.get_world_size()
    dist.gather_object(own, by_rank)
    if by_rank is None:
        return None
    return {
        "step": training.step_count,
        "config": asdict(training.options.model),
        "text": training.corpus.fingerprint(),
        "model": {name: value for part in by_rank for name, value in part["model"].items()},
        "optimizer": {name: s for part in by_rank for name, s in part["optimizer"].items()},
        "rng": [part["rng"] for part in by_rank],
    }


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a file that replaces the old one only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def check(path: Path, options: Options) -> None:
    """Raise a ``ValueError`` that says what to do unless the file holds such a model."""
    if not path.is_file():
        raise ValueError(
            f"--resume needs {path}, which is not there: start without --resume, or name "
            f"another --checkpoint"
        )
    config = torch.load(path, weights_only=True, mmap=True)["config"]
    wanted = asdict(options.model)
    for name, found in config.items():
        if wanted[name] != found:
            raise ValueError(
                f"{path} holds a model with {name}={found}, not {wanted[name]}: "
                f"give --{name} {found}, or start without --resume"
            )


def restore(training: Training, path: Path) -> None:
    """Read the file on rank 0 and go on from it on all ranks.

    Raises:
        ValueError: If the run has read other text than this one.
    """
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        box[0] = torch.load(path, weights_only=True)
    dist.broadcast_object_list(box)
    checkpoint: Checkpoint = box[0]
    if checkpoint["text"] != training.corpus.fingerprint():
        raise ValueError(f"{path} was trained on other text: give the same --data")
    training.step_count = checkpoint["step"]
    for module in training.model.modules:
        module.load_state_dict({name: checkpoint["model"][name] for name in module.state_dict()})
        for name, parameter in module.named_parameters():
            state = checkpoint["optimizer"][name]
            training.optimizer.state[parameter] = {k: v.clone() for k, v in state.items()}
    if len(checkpoint["rng"]) == dist.get_world_size():
        torch.set_rng_state(checkpoint["rng"][dist.get_rank()])


def _own_modules(training: Training) -> list[torch.nn.Module]:
    """Return the stages of which this rank holds the first copy."""
    model = training.model
    is_mirrored = isinstance(model, PipelinedGPT) and model.pipeline.is_mirrored
    return list(model.modules[:1] if is_mirrored else model.modules)


def _own_weights(training: Training) -> dict[str, Tensor]:
    modules = _own_modules(training)
    return {name: value for module in modules for name, value in module.state_dict().items()}


def _own_optimizer_state(training: Training) -> dict[str, dict[str, Tensor]]:
    return {
        name: dict(training.optimizer.state[parameter])
        for module in _own_modules(training)
        for name, parameter in module.named_parameters()
    }
