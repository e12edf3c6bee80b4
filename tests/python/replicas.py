"""Pipelines side by side, as processes: two of four ranks."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from loops import IGNORED, make_batch, make_gpt, make_infinite, make_optimizer, token_loss
from outcomes import Outcome, attempt
from saved_runs import State, state_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.data import DataLoader, TensorDataset

import dualpipe_ext.training.replicas
from dualpipe_ext import DualPipeConfig, TrainingWrapper, setup_dual_pipe
from dualpipe_ext.adapters import Partition
from dualpipe_ext.checkpoint import export_pretrained
from dualpipe_ext.training import ReplicaBatchSampler, collate_rows
from dualpipe_ext.training.replicas import split_mesh

SAMPLES, BATCH = 45, 18  # 9 rows a replica, and 9 samples left: 5 and 4
EPOCHS = 4
GROUPS = ("process_group", "replica_group")
WITHOUT_LABELS = 2  # in this batch the second replica's rows are padding alone


def data() -> TensorDataset:
    return TensorDataset(*make_batch(SAMPLES, seed=1))


def loader(drop_last: bool, **share: Any) -> DataLoader[Any]:
    sampler = ReplicaBatchSampler(SAMPLES, BATCH, seed=5, drop_last=drop_last, **share)
    return DataLoader(data(), batch_sampler=sampler)


def collate_epochs(found: DataLoader[Any], first_padding: int) -> list[list[Tensor]]:
    """All batches; one of them without labels from a row on."""
    batches = []
    for epoch in range(EPOCHS):
        found.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        batches += list(found)
    batches[WITHOUT_LABELS][1][first_padding:] = IGNORED
    return batches


def batches_of(share: dict[str, int]) -> list[list[Tensor]]:
    """Of one replica."""
    return collate_epochs(loader(True, **share), 0 if share["replica"] else BATCH // 2)


def train(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """The run on one rank of the mesh, and what it does about failures."""
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "pp"))
    share = {"replica": mesh.get_local_rank("dp"), "num_replicas": 2}
    model = make_gpt()
    with torch.no_grad():  # the first replica's parameters count
        for parameter in model.parameters():
            parameter.add_(share["replica"])
    wrapper = TrainingWrapper(
        model,
        setup_dual_pipe(model, num_stages=size // 2),
        optimizer=make_optimizer,
        loss_fn=token_loss,
        reduction="token",
        shifts_labels=False,
        max_grad_norm=0.3,
        accumulation_steps=2,
        mesh=mesh,
    )
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step, batch in enumerate(batches_of(share)):
        found["losses"].append(float(wrapper.train_step(batch)))
        if step % 2:
            found["norms"].append(float(wrapper.grad_norm or 0))
    found["evaluated"] = float(wrapper.evaluate(loader(False, **share)))
    found["state"] = {
        (stage, name): value.clone()
        for stage, module in zip(wrapper.pipeline.stages, wrapper.pipeline.module, strict=True)
        for name, value in module.state_dict().items()
    }
    other_mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
    found["wrong mesh"] = attempt(split_mesh, other_mesh)
    before = [parameter.detach().clone() for parameter in wrapper.pipeline.parameters()]
    found["failures"] = [
        fail(wrapper, rank, how) for how in ("batch", "stage", "different", "sum", "update")
    ]
    found["failures"].append(attempt(wrapper.predict, [] if rank == 1 else make_batch(8, seed=2)))
    found["num_steps"] = wrapper.pipeline.num_steps
    found["predicted"] = predict_with_norms(mesh, share["replica"])
    found["exported"] = export_norms(mesh, share["replica"], folder)
    wrong = {"reduction": "median"} if rank == 1 else {}
    found["failures"].append(attempt(make, mesh=mesh, **wrong))
    with torch.no_grad():
        for parameter, value in zip(wrapper.pipeline.parameters(), before, strict=True):
            parameter.copy_(value)
    found["cut"] = cut_by_times(mesh, share["replica"])
    wider = make_gpt(5) if share["replica"] else make_gpt()
    config = DualPipeConfig(balance=[1, 1, 1, 1 + share["replica"]])
    found["other stages"] = attempt(TrainingWrapper, wider, config, make_optimizer, mesh=mesh)
    found["wrong groups"] = attempt(make, **dict.fromkeys(GROUPS, mesh.get_group("pp")))
    found["mesh and groups"] = attempt(make, mesh=mesh, replica_group=mesh.get_group("dp"))
    found["halves"] = {
        schedule: train_by_halves(mesh, share, schedule) for schedule in ("dualpipe", "1f1b")
    }
    found["sharded"] = train_sharded(mesh, share, folder)
    found["evaluated again"] = float(wrapper.evaluate(loader(False, **share)))
    return found


class Norms(nn.Sequential):
    """A model with batch norms that saves itself as those of transformers do."""

    def __init__(self) -> None:
        super().__init__(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(4)))

    def save_pretrained(self, folder: Path, state_dict: State) -> None:
        folder.mkdir()
        torch.save(state_dict, folder / "weights")


def train_norms(mesh: DeviceMesh, replica: int) -> tuple[TrainingWrapper, Norms]:
    """Each replica's batch norms see other rows."""
    torch.manual_seed(0)
    model = Norms()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that each copy has its own statistics
        wrapper = TrainingWrapper(model, loss_fn=nn.functional.mse_loss, mesh=mesh)
    generator = torch.Generator().manual_seed(replica)
    x = torch.randn(16, 4, generator=generator)
    wrapper.train_step((x, x.sin()))
    return wrapper, model


def export_norms(
    mesh: DeviceMesh, replica: int, folder: Path
) -> tuple[list[Tensor], Tensor, Outcome]:
    """The mean that a norm of the first stage has seen, where that is, and what is exported.

    Then, how an export fails for which the second replica gives another model.
    """
    wrapper, model = train_norms(mesh, replica)
    own = [
        buffer.clone()
        for stage, module in zip(wrapper.pipeline.stages, wrapper.pipeline.module, strict=True)
        for name, buffer in module.named_buffers()
        if stage == 0 and name.endswith("running_mean")
    ]
    export = partial(export_pretrained, pipeline=wrapper.pipeline, replicas=mesh.get_group("dp"))
    export(folder / "norms", model=model)
    failed = attempt(export, folder / "none", model=nn.Linear(2, 2) if replica else model)
    return own, torch.load(folder / "norms" / "weights")["0.1.running_mean"], failed


def predict_with_norms(mesh: DeviceMesh, replica: int) -> Tensor | None:
    """Outputs for the same rows on all replicas, whose batch norms have seen different ones."""
    wrapper, _ = train_norms(mesh, replica)
    found = wrapper.predict(torch.ones(16, 4))
    assert found is None or isinstance(found, Tensor)
    return found


def make(**options: Any) -> TrainingWrapper:
    return TrainingWrapper(make_gpt(), None, make_optimizer, loss_fn=token_loss, **options)


def cut_by_times(mesh: DeviceMesh, replica: int) -> list[tuple[str, ...]]:
    """The layers of each stage; on the second replica's machines the last block is slow."""
    model = make_gpt(8)
    if replica:
        last = model.get_submodule("blocks.7")
        last.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    wrapper = TrainingWrapper(
        model,
        DualPipeConfig(balance="time"),
        make_optimizer,
        sample_inputs=(make_batch(2, seed=1)[0],),
        mesh=mesh,
    )
    partition = wrapper.pipeline.module[0]
    assert isinstance(partition, Partition)
    return [stage.layers for stage in partition.plan.stages]


def train_by_halves(mesh: DeviceMesh, share: dict[str, Any], schedule: str) -> list[float]:
    """Losses of the first batches, of which each end reads its own rows; and the norm of both."""
    model = make_gpt(tied=False)
    with torch.no_grad():
        model.get_parameter("head.weight").copy_(model.get_parameter("token.weight"))
    wrapper = TrainingWrapper(
        model,
        setup_dual_pipe(model, num_stages=mesh["pp"].size(), schedule=schedule),
        optimizer=make_optimizer,
        loss_fn=token_loss,
        reduction="token",
        shifts_labels=False,
        max_grad_norm=0.3,
        accumulation_steps=2,
        process_group=mesh.get_group("pp"),
        replica_group=mesh.get_group("dp"),
    )
    text, labels = data().tensors
    inputs = rows_of(text, lambda rows: wrapper.own_rows(rows)[0], share)
    targets = rows_of(labels, lambda rows: wrapper.own_rows(rows)[1], share)
    steps = zip(inputs, targets, strict=True)
    losses = [float(wrapper.train_step(batch, halves=True)) for batch in steps]
    assert wrapper.grad_norm is not None
    return [*losses, float(wrapper.grad_norm)]


def rows_of(tensor: Tensor, rows: Callable[[int], range], share: dict[str, Any]) -> DataLoader[Any]:
    sampler = ReplicaBatchSampler(SAMPLES, BATCH, seed=5, rows=rows, **share)
    return DataLoader(TensorDataset(tensor), batch_sampler=sampler, collate_fn=collate_rows)


def train_sharded(mesh: DeviceMesh, share: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With an optimizer state in shards (ZeRO-1), which is saved, and scaled losses."""
    model = make_gpt()
    wrapper = TrainingWrapper(
        model,
        setup_dual_pipe(model, num_stages=mesh["pp"].size()),
        optimizer=ZeroRedundancyOptimizer,
        optimizer_options={
            "optimizer_class": torch.optim.AdamW,
            "process_group": mesh.get_group("dp"),
            "lr": 5e-3,
            "eps": 1e-3,
        },
        loss_fn=token_loss,
        reduction="token",
        shifts_labels=False,
        max_grad_norm=0.3,
        accumulation_steps=2,
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10),
        mesh=mesh,
    )
    batches = batches_of(share)
    losses = [float(wrapper.train_step(batch)) for batch in batches]
    before = state_of(wrapper.pipeline, sharded := wrapper.optimizer.optim)  # type: ignore[attr-defined]
    if dist.get_rank() == 0:
        make_infinite(wrapper.pipeline, "blocks.0.norm1.weight")
    wrapper.train_step(batches[0], update=True)
    scaler = wrapper._trained_by.scaler
    assert scaler is not None
    wrapper.save_checkpoint(folder)
    return {
        "losses": losses,
        "share": len(sharded.state) / len(list(wrapper.pipeline.parameters())),
        "before": before,
        "after": state_of(wrapper.pipeline, sharded),
        "scale": scaler.get_scale(),
        "updates": wrapper.num_updates,
    }


def load_sharded(rank: int, size: int, folder: Path) -> tuple[State, int, float]:
    """What was saved, by a pipeline of another size, without replicas and shards."""
    model = make_gpt()
    wrapper = TrainingWrapper(
        model,
        setup_dual_pipe(model, num_stages=size),
        optimizer=torch.optim.AdamW,
        scaler=torch.amp.GradScaler("cpu", init_scale=1.0),
        loss_fn=token_loss,
        reduction="token",
        shifts_labels=False,
    )
    wrapper.load_checkpoint(folder)
    scaler = wrapper._trained_by.scaler
    assert scaler is not None
    state = state_of(wrapper.pipeline, wrapper.optimizer)
    return state, wrapper.num_updates, scaler.get_scale()


def die(rank: int, size: int, folder: Path) -> None:
    """One rank of the second replica is killed within a step; the others note what they are told."""
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "pp"))
    model = make_gpt()
    config = setup_dual_pipe(model, num_stages=size // 2)
    wrapper = TrainingWrapper(model, config, make_optimizer, mesh=mesh)
    if rank == size - 1:
        wrapper.pipeline.module[0].register_forward_pre_hook(
            lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        )
    outcome = attempt(wrapper.train_step, make_batch(8, seed=2))
    (folder / str(rank)).write_text(f"{outcome.error}: {outcome.seconds}: {outcome.text}")


def raise_error(*_: object) -> None:
    raise RuntimeError("out of luck")


def fail(wrapper: TrainingWrapper, rank: int, how: str) -> Outcome:
    """Something goes wrong on rank 1 alone, which is in the first replica."""
    text, labels = make_batch(8, seed=2)
    if rank == 1 and how == "batch":
        text = text[:3]
    if rank == 1 and how == "different":
        text = text.flip(0)
    with ExitStack() as changed:
        if rank == 1 and how == "stage":
            stage = wrapper.pipeline.module[0]
            changed.callback(stage.register_forward_pre_hook(raise_error).remove)
        if rank == 1 and how == "update":
            changed.callback(wrapper.optimizer.register_step_pre_hook(raise_error).remove)
        if rank == 1 and how == "sum":
            changed.enter_context(
                patch.object(dualpipe_ext.training.replicas, "make_buckets", raise_error)
            )
        return attempt(wrapper.train_step, (text, labels), update=how in ("sum", "update"))


def train_unsplit() -> dict[str, Any]:
    model = make_gpt()
    optimizer = make_optimizer(model.parameters())
    found: dict[str, Any] = {"losses": [], "norms": []}
    batches = collate_epochs(loader(True), BATCH // 2)
    for pair in zip(batches[::2], batches[1::2], strict=True):
        total = sum(int((labels != -100).sum()) for _, labels in pair)
        for text, labels in pair:
            loss = token_loss(model(text)[0], None, labels)
            found["losses"].append(float(loss.detach()))
            (loss * int((labels != -100).sum()) / total).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        found["norms"].append(float(norm))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        text, labels = data().tensors
        found["evaluated"] = float(token_loss(model(text)[0], None, labels))
    found["state"] = model.state_dict()
    return found
