"""Pipelines whose stages are sharded, as processes: two places, and two ranks in each."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import torch
import torch.distributed as dist
from outcomes import Outcome, attempt
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from dualpipe_ext import DualPipe, DualPipeConfig, Pipeline, TrainingWrapper
from dualpipe_ext.checkpoint import save_checkpoint

PLACES, BESIDE = 2, 2  # ranks of a pipeline, and ranks in the same place
CHUNKS, ROWS, WIDTH, HIDDEN = 8, 2, 5, 4  # rows of a micro-batch; a width in unequal shards
HALF = CHUNKS * ROWS // 2
STEPS = 6
# (place, replicas, call of the stage, in its backward)
FAILURES = [
    (0, (0, 1), 2, False),
    (1, (0, 1), 3, True),
    (0, (1,), CHUNKS // 2, True),
    (1, (0,), 1, False),
]
NAMES = ("dp", "pp")
# What FSDP calls, under the names that torch has for it from 2.13 on, or those before.
REDUCE = next(n for n in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, n))
GATHER = next(n for n in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, n))
Sharding = Callable[[nn.Module, DeviceMesh], object]


class Block(nn.Module):
    """A block of a transformer without its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.down(nn.functional.gelu(self.up(self.norm(x))))
        return x + changed


def whole_stages() -> list[nn.Module]:
    """The stages of the model in one piece, the same on every rank."""
    torch.manual_seed(3)
    return [nn.Sequential(Block(), Block()) for _ in range(PLACES)]


def criterion(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output.to(target.dtype), target) / CHUNKS


def batch(step: int, replica: int) -> Tensor:
    """All rows of one pipeline: those of both halves."""
    generator = torch.Generator().manual_seed(100 * step + replica)
    return torch.randn(2 * HALF, WIDTH, generator=generator)


def own_ends(place: int, rows: Tensor) -> tuple[Tensor | None, tuple[Tensor | None]]:
    """What enters and what is compared in one place of a DualPipe of two ranks."""
    halves = rows.split(HALF)
    return halves[place], (halves[1 - place].sin(),)


def run_step(pipeline: Pipeline, place: int, rows: Tensor, **options: Any) -> Tensor | None:
    if pipeline.is_mirrored:
        inputs, labels = own_ends(place, rows)
    else:
        inputs = rows if place == 0 else None
        labels = (rows.sin() if place == PLACES - 1 else None,)
    loss, _ = pipeline.step(
        inputs, num_chunks=CHUNKS, criterion=criterion, labels=labels, **options
    )
    return loss


def fsdp(module: nn.Module, mesh: DeviceMesh, **options: Any) -> None:
    """Each block for itself, and the whole stage, as FSDP2's users do."""
    for block in module.children():
        fully_shard(block, mesh=mesh, **options)
    fully_shard(module, mesh=mesh, **options)


def fsdp_in_one(module: nn.Module, mesh: DeviceMesh) -> None:
    """The whole stage alone, which FSDP leaves gathered behind a forward that no backward follows."""
    fully_shard(module, mesh=mesh)


def tensor_parallel(module: nn.Module, mesh: DeviceMesh) -> None:
    for block in module.children():
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


class Rank:
    """One process: its meshes, and the stages of its place."""

    def __init__(self, config: dict[str, Any] | None = None, schedule: str = "dualpipe") -> None:
        # Replicas side by side, or the ranks that share a replica's matrices: it's all the same.
        self.mesh = init_device_mesh("cpu", (BESIDE, PLACES), mesh_dim_names=NAMES)
        self.place = self.mesh.get_local_rank("pp")
        self.beside = self.mesh.get_local_rank("dp")
        self.schedule = schedule
        self.config = DualPipeConfig(timeout=20.0, **(config or {}))
        self.whole = whole_stages()
        self.stages = [self.place, PLACES - 1 - self.place][: 2 if schedule == "dualpipe" else 1]

    def pipeline(self, shard: Sharding, stages: Sequence[nn.Module] | None = None) -> Pipeline:
        own = stages or [copy.deepcopy(self.whole[stage]) for stage in self.stages]
        for module in own:
            shard(module, self.mesh["dp"])
        group = self.mesh.get_group("pp")
        return Pipeline(own, self.schedule, process_group=group, config=self.config)

    def gradients(self, pipeline: Pipeline) -> dict[str, Tensor | None]:
        return self.by_name(pipeline, lambda p: p.grad)

    def parameters(self, pipeline: Pipeline) -> dict[str, Tensor | None]:
        return self.by_name(pipeline, lambda p: p)

    def by_name(
        self, pipeline: Pipeline, what: Callable[[nn.Parameter], Tensor | None]
    ) -> dict[str, Tensor | None]:
        """Whole tensors, by their names in the model in one piece."""
        return {
            f"{stage}.{name}": whole(what(parameter))
            for stage, module in zip(pipeline.stages, pipeline.module, strict=True)
            for name, parameter in module.named_parameters()
        }


def whole(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    gathered: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered.detach().clone()


def counting(name: str) -> AbstractContextManager[Mock]:
    """Counts the calls of a collective."""
    return patch.object(dist, name, wraps=getattr(dist, name))


def one_step(shard: Sharding, replicas: bool, **options: Any) -> dict[str, Any]:
    """A step, its sum, and the norm."""
    within = options.pop("within", False)
    rank = Rank(**options)
    pipeline = rank.pipeline(shard)
    rows = batch(0, rank.beside if replicas else 0)
    with counting(REDUCE) as reduce_scatter, counting(GATHER) as all_gather:
        loss = run_step(pipeline, rank.place, rows, sync_gradients=within)
    if not within:
        pipeline.sync_gradients()
    pipeline.check_copies()
    return {
        "loss": loss,
        "grads": rank.gradients(pipeline),
        "norm": float(pipeline.clip_grad_norm_(0.5)),
        "clipped": rank.gradients(pipeline),
        "largest": float(pipeline.clip_grad_norm_(float("inf"), float("inf"))),
        "split": pipeline.weight_split.to_dict()["shares"],
        "reductions": reduce_scatter.call_count,
        "gathers": all_gather.call_count,
    }


def sharded_twice() -> dict[str, Any]:
    """The whole model on one rank of a pipeline, by FSDP over replicas of its tensor parallelism."""
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("dp", "tp", "pp"))
    stage = nn.Sequential(*whole_stages())
    for module in stage.children():
        tensor_parallel(module, mesh["tp"])
        fsdp(module, mesh["dp"])
    config = DualPipeConfig(timeout=20.0)
    group = mesh.get_group("pp")
    pipeline = Pipeline([stage], "1f1b", process_group=group, config=config)
    rows = batch(0, mesh.get_local_rank("dp"))
    pipeline.step(rows, num_chunks=CHUNKS, criterion=criterion, labels=(rows.sin(),))
    grads = {name: whole(p.grad) for name, p in stage.named_parameters()}
    split = pipeline.weight_split.to_dict()["shares"]
    return {"grads": grads, "norm": float(pipeline.clip_grad_norm_(0.5)), "split": split}


def accumulated() -> dict[str, Any]:
    """Two steps of the same batch are one of twice the gradient."""
    rank = Rank()
    pipeline = rank.pipeline(fsdp)
    for _ in range(2):
        run_step(pipeline, rank.place, batch(0, rank.beside))
    pipeline.sync_gradients()
    return {"grads": rank.gradients(pipeline)}


def trained(shard: Sharding, replicas: bool) -> dict[str, Any]:
    """Some steps of AdamW with clipped gradients, evaluated now and then."""
    rank = Rank()
    pipeline = rank.pipeline(shard)
    optimizer = torch.optim.AdamW(pipeline.parameters(), lr=1e-2)
    norms = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            run_step(
                pipeline,
                rank.place,
                batch(step, rank.beside if replicas else 0),
                sync_gradients=True,
            )
            norms.append(float(pipeline.clip_grad_norm_(0.5)))
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                loss = run_step(pipeline, rank.place, batch(STEPS, 0))
            if shard is fsdp_in_one:
                assert all(isinstance(p, DTensor) for p in pipeline.parameters())
    pipeline.check_copies()
    return {
        "norms": norms,
        "parameters": rank.parameters(pipeline),
        "evaluated": loss,
        "warnings": [str(w.message) for w in caught],
    }


@contextmanager
def failing(module: nn.Module, call: int, backward: bool) -> Iterator[None]:
    """Has the module raise in its n-th call, or in the backward of that."""
    calls = 0

    def fail(*_: Any) -> None:
        raise RuntimeError("no more")

    def count(_: nn.Module, __: Any, output: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == call and not backward:
            fail()
        if calls == call:
            output.register_hook(fail)

    handle = module.register_forward_hook(count)
    yield
    handle.remove()


def after_failures() -> dict[str, Any]:
    """Steps that fail in some place of some replica, and one that does not."""
    rank = Rank()
    pipeline = rank.pipeline(fsdp)
    failures = []
    if rank.beside == 0:  # before FSDP has seen a forward
        pipeline.abandon_step(ValueError("no batch"))
    else:
        failures.append(attempt(run_step, pipeline, rank.place, batch(1, 1)))
    for place, replicas, call, backward in FAILURES:
        is_here = place == rank.place and rank.beside in replicas
        with failing(pipeline.module[0][1], call if is_here else 0, backward):  # type: ignore[index]
            failures.append(attempt(run_step, pipeline, rank.place, batch(1, rank.beside)))
        pipeline.zero_grad()
    if rank.beside == 0:  # an error of the caller's, before anything runs
        failures.insert(0, attempt(pipeline.step, None, num_chunks=CHUNKS + 1))
    else:
        failures.insert(0, attempt(run_step, pipeline, rank.place, batch(1, 1)))
    run_step(pipeline, rank.place, batch(0, rank.beside), sync_gradients=True)
    return {"failures": failures, "grads": rank.gradients(pipeline)}


def failure_where_one_place_is_sharded() -> dict[str, Any]:
    """The place that is not sharded fails, on one replica."""
    rank = Rank(schedule="1f1b")

    def shard(module: nn.Module, mesh: DeviceMesh) -> None:
        if rank.place == 1:
            fsdp(module, mesh)

    pipeline = rank.pipeline(shard)
    is_here = rank.place == 0 and rank.beside == 1
    with failing(pipeline.module[0][1], 2 if is_here else 0, backward=False):  # type: ignore[index]
        failure = attempt(run_step, pipeline, rank.place, batch(1, rank.beside))
    pipeline.zero_grad()
    run_step(pipeline, rank.place, batch(0, rank.beside))
    return {"failure": failure, "grads": rank.gradients(pipeline) if rank.place == 1 else {}}


def current_weights() -> dict[str, Any]:
    """Weights change after a step without a backward, and after a call outside of steps."""
    rank = Rank()
    rank.whole = [TrainedAlone(stage) for stage in rank.whole]
    pipeline = rank.pipeline(fsdp)
    parameters = list(pipeline.parameters())  # as an optimizer holds them
    found = []
    for outside in (False, True):
        with torch.no_grad():
            if outside:
                pipeline.module[0](batch(0, 0)[:ROWS])
            else:
                pipeline.eval()
                run_step(pipeline, rank.place, batch(0, 0))
                pipeline.train()
            for parameter in parameters:
                parameter.mul_(0.5)
                parameter.grad = None
        run_step(pipeline, rank.place, batch(0, rank.beside), sync_gradients=True)
        found.append(rank.gradients(pipeline))
    return {"halved": found[0], "quartered": found[1]}


class TrainedAlone(nn.Sequential):
    """Its second part does not run in evaluation."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__(*stage.children())

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self[0](x)
        return self[1](output) if self.training else output


class InSequence(nn.Module):
    """A block whose rows are sharded along their time, with a norm for what is large alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.extra = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.extra(output) if float(x.detach().max()) > 50.0 else output


def in_sequence_stages() -> list[nn.Module]:
    torch.manual_seed(4)
    return [nn.Sequential(InSequence()) for _ in range(PLACES)]


def in_sequence_rows() -> Tensor:
    rows = torch.randn(2 * HALF, BESIDE, WIDTH, generator=torch.Generator().manual_seed(2))
    rows[:HALF] += 100.0
    return rows


def sum_of_squares(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output, target, reduction="sum") / CHUNKS


def partial_sums() -> dict[str, Any]:
    """Norms whose gradients torch leaves as partial sums; one of them on one copy alone."""
    rank = Rank()
    rank.whole = in_sequence_stages()
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "extra": SequenceParallel(use_local_output=True),
    }

    def shard(module: nn.Module, mesh: DeviceMesh) -> None:
        for block in module.children():
            parallelize_module(block, mesh, plan)

    pipeline = rank.pipeline(shard)
    halves = in_sequence_rows().chunk(BESIDE, 1)[rank.beside].split(HALF)
    own, other = halves[rank.place], halves[1 - rank.place]
    pipeline.step(own, num_chunks=CHUNKS, criterion=sum_of_squares, labels=(other.sin(),))
    pipeline.sync_gradients()
    grads = {name: grad for name, grad in rank.gradients(pipeline).items() if grad is not None}
    return {"grads": grads, "norm": float(pipeline.clip_grad_norm_(float("inf")))}


class SometimesUsed(nn.Module):
    """A scale for what is large alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(self.scale(x) if float(x.detach().mean()) > 10.0 else x)
        return output


def unused_by_one_copy() -> dict[str, Any]:
    """A gradient that only one copy of a stage has becomes the other's as well."""
    rank = Rank()
    rank.whole = [SometimesUsed(stage) for stage in rank.whole]
    pipeline = rank.pipeline(fsdp_in_one)
    rows = batch(0, rank.beside)
    rows[:HALF] += 100.0  # those that enter in the first place
    run_step(pipeline, rank.place, rows, sync_gradients=True)
    placements = [str(p.grad.placements) for p in pipeline.parameters() if p.grad is not None]  # type: ignore[attr-defined]
    return {
        "grads": rank.gradients(pipeline),
        "placements": placements,
        "whole": rows,
    }


def copies_that_differ() -> list[Outcome]:
    """One copy's shard is changed on one rank, and made equal again."""
    rank = Rank()
    pipeline = rank.pipeline(fsdp)
    if rank.place == 1:
        with torch.no_grad():
            next(pipeline.module[0].parameters()).mul_(1.5)
    found = [attempt(pipeline.check_copies)]
    pipeline.sync_parameters()
    return [*found, attempt(pipeline.check_copies)]


def sharded_on_one_place() -> Outcome:
    """The copies of a stage are held in other ways."""
    rank = Rank()

    def shard(module: nn.Module, mesh: DeviceMesh) -> None:
        if rank.place == 0:
            fully_shard(module, mesh=mesh)

    return attempt(rank.pipeline, shard)


def refused(folder: Path) -> dict[str, Outcome]:
    """What needs whole tensors."""
    rank = Rank()
    pipeline = rank.pipeline(fsdp)
    stages = [nn.Sequential(Block()) for _ in range(2)]
    for stage in stages:
        fsdp(stage, rank.mesh["dp"])

    def sharded_output(module: nn.Module, mesh: DeviceMesh) -> None:
        output = PrepareModuleOutput(
            output_layouts=Replicate(), desired_output_layouts=Replicate(), use_local_output=False
        )
        parallelize_module(module, mesh, output)

    def whole_only(module: nn.Module, mesh: DeviceMesh) -> None:
        """It is as it is."""

    def in_ddp(stage: nn.Module) -> nn.Module:
        return nn.Sequential(DistributedDataParallel(stage, process_group=beside))

    def in_fsdp1(stage: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(stage, process_group=beside, device_id=torch.device("cpu"))

    returning = rank.pipeline(sharded_output)
    late = rank.pipeline(whole_only)
    with_main_grad = rank.pipeline(fsdp)
    for parameter in with_main_grad.parameters():
        parameter.main_grad = torch.zeros(1)  # type: ignore[attr-defined]
    fsdp_in_one(late.module[0], rank.mesh["dp"])
    group, beside = rank.mesh.get_group("pp"), rank.mesh.get_group("dp")
    return {
        "save": attempt(save_checkpoint, folder, pipeline, step=1),
        "late": attempt(run_step, late, rank.place, batch(0, 0)),
        "ddp": attempt(rank.pipeline, whole_only, [in_ddp(stage) for stage in whole_stages()]),
        "replicate": attempt(
            rank.pipeline,
            lambda module, mesh: replicate(module, process_group=mesh.get_group()),
        ),
        "main_grad": attempt(run_step, with_main_grad, rank.place, batch(0, 0)),
        "fsdp1": attempt(rank.pipeline, whole_only, [in_fsdp1(stage) for stage in whole_stages()]),
        "wrapper": attempt(TrainingWrapper, stages, process_group=group),
        "output": attempt(run_step, returning, rank.place, batch(0, 0)),
    }


def resumed(folder: Path) -> dict[str, Any]:
    """Shards that torch saves and loads: each copy of a stage under the stage's name."""
    rank = Rank()
    first, second = rank.pipeline(fsdp), rank.pipeline(fsdp)
    optimizers = [torch.optim.AdamW(p.parameters(), lr=1e-2) for p in (first, second)]
    run_step(first, rank.place, batch(0, rank.beside), sync_gradients=True)
    optimizers[0].step()
    save(_state(first), checkpoint_id=folder)
    state = _state(second)
    load(state, checkpoint_id=folder)
    for stage, module in zip(second.stages, second.module, strict=True):
        module.load_state_dict(state[f"stage {stage}"])
    second.check_copies()
    return {"saved": rank.parameters(first), "loaded": rank.parameters(second)}


def _state(pipeline: DualPipe | Pipeline) -> dict[str, Any]:
    stages = zip(pipeline.stages, pipeline.module, strict=True)
    return {f"stage {stage}": module.state_dict() for stage, module in stages}


def bf16() -> dict[str, Any]:
    """Products in bf16, gradients reduced and kept in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def shard(module: nn.Module, mesh: DeviceMesh) -> None:
        fsdp(module, mesh, mp_policy=policy)

    rank = Rank()
    pipeline = rank.pipeline(shard)
    loss = run_step(pipeline, rank.place, batch(0, rank.beside), sync_gradients=True)
    grads = rank.gradients(pipeline)
    return {
        "loss": loss,
        "grads": grads,
        "dtypes": {str(g.dtype) for g in grads.values() if g is not None},
    }


def everything(number: int, size: int, folder: Path) -> dict[str, Any]:
    """On each of four ranks."""
    assert size == PLACES * BESIDE
    torch.set_num_threads(1)
    return {
        "fsdp": one_step(fsdp, replicas=True),
        "fsdp, within": one_step(fsdp, replicas=True, within=True),
        "fsdp, 1f1b": one_step(fsdp, replicas=True, schedule="1f1b"),
        "fsdp, zb1p": one_step(fsdp, replicas=True, schedule="zb1p"),
        "fsdp, recomputed": one_step(
            fsdp, replicas=True, config={"memory_optimization": "activation_checkpoint"}
        ),
        "fsdp, never split": one_step(
            fsdp, replicas=True, config={"split_weight_gradients": False}
        ),
        "tp": one_step(tensor_parallel, replicas=False),
        "tp, within": one_step(tensor_parallel, replicas=False, within=True),
        "twice": sharded_twice(),
        "accumulated": accumulated(),
        "fsdp trained": trained(fsdp_in_one, replicas=True),
        "tp trained": trained(tensor_parallel, replicas=False),
        "bf16": bf16(),
        "after failures": after_failures(),
        "one place fails": failure_where_one_place_is_sharded(),
        "current": current_weights(),
        "partial": partial_sums(),
        "unused": unused_by_one_copy(),
        "copies": copies_that_differ(),
        "one place": sharded_on_one_place(),
        "refused": refused(folder / "refused"),
        "resumed": resumed(folder / "resumed"),
        "beside": number // PLACES,
    }
