"""Hugging Face's trainer over pipelines side by side, as processes: two of two ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from outcomes import Outcome, attempt
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from trainers import Run, Texts, run

from dualpipe_ext import DualPipeConfig
from dualpipe_ext.compat import DualPipeTrainer

NUM_REPLICAS = 2


@dataclass
class Ranks:
    """This rank's place in the mesh, and what it may be given wrongly."""

    rank: int
    mesh: DeviceMesh

    @property
    def replica(self) -> int:
        return self.mesh.get_local_rank("dp")

    def make(self, job: Run, **options: Any) -> Any:
        if "process_group" not in options:
            options = {"mesh": self.mesh, **options}
        return job.make(DualPipeTrainer, num_chunks=2 * self.mesh["pp"].size(), **options)


def run_all(rank: int, size: int, jobs: dict[str, Run], saved: Run) -> dict[str, Any]:
    """All runs; one that goes on from its checkpoint of step 2; what is told to all, or refused."""
    shape = (NUM_REPLICAS, size // NUM_REPLICAS)
    ranks = Ranks(rank, init_device_mesh("cpu", shape, mesh_dim_names=("dp", "pp")))
    found: dict[str, Any] = {name: run(ranks.make(job)) for name, job in jobs.items()}
    found["resumed"] = run(ranks.make(saved), resume=2)
    trainer = ranks.make(replace(saved, folder=f"{saved.folder}, not saved"))
    found["seed"] = trainer.pipeline.config.seed
    found["writes"] = trainer.args.should_save
    found["nothing to resume"] = attempt(trainer.train, resume_from_checkpoint=True)
    if rank == 0:
        trainer._save = full_disk
    found["unsaved"] = attempt(trainer.save_model, f"{saved.folder}, unsaved")
    found["other batches"] = other_batches(ranks, saved)
    found["not updated"] = attempt(fail_to_update, ranks, saved)
    return {**found, **refused(ranks, saved)}


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError("No space left on device")


def other_batches(ranks: Ranks, job: Run) -> list[Outcome]:
    """Each replica reads its own data, in training and for a prediction."""
    trainer = ranks.make(job)
    other = Texts(8, seed=ranks.replica)
    trainer.train_dataset = other
    return [attempt(trainer.train), attempt(trainer.predict, other)]


def fail_to_update(ranks: Ranks, job: Run) -> None:
    """The optimizer of the second replica's first rank raises."""
    trainer = ranks.make(job)
    trainer.create_optimizer()

    def fail(*_: Any) -> None:
        if (ranks.replica, trainer.pipeline.rank) == (1, 0):
            raise RuntimeError("out of luck")

    getattr(trainer.optimizer, "optimizer", trainer.optimizer).register_step_pre_hook(fail)
    trainer.train()


def refused(ranks: Ranks, job: Run) -> dict[str, Outcome]:
    """What cannot be done, by what the error says."""
    mesh = ranks.mesh
    tensor = init_device_mesh("cpu", tuple(mesh.shape), mesh_dim_names=("dp", "tp"))
    wider = replace(job, model={"n_layer": 4 + 2 * ranks.replica})
    buckets = DualPipeConfig(bucket_bytes=1024 << ranks.replica)
    schedule = DualPipeConfig(schedule="1f1b" if ranks.replica else "dualpipe")
    turned = DeviceMesh("cpu", [[0, 3], [1, 2]], mesh_dim_names=("dp", "pp"))
    own = {"process_group": mesh.get_group("pp")}
    return {
        "it needs 'pp' and 'dp'": attempt(ranks.make, job, mesh=tensor),
        "leave out process_group=": attempt(ranks.make, job, **own, mesh=mesh),
        "none may be in two of them": attempt(
            ranks.make, job, **own, replica_group=mesh.get_group("pp")
        ),
        "have the numbers [": attempt(ranks.make, job, mesh=turned),
        "the replicas have other stages": attempt(ranks.make, wider),
        "replicas differ in bucket_bytes": attempt(ranks.make, job, config=buckets),
        "replicas differ in schedule": attempt(ranks.make, job, config=schedule),
        "has its state in shards": attempt(train_in_shards, ranks, job),
    }


def train_in_shards(ranks: Ranks, job: Run) -> None:
    trainer = ranks.make(job)
    trainer.optimizer = ZeroRedundancyOptimizer(
        trainer.model.parameters(), torch.optim.SGD, ranks.mesh.get_group("dp"), lr=0.1
    )
    trainer.train()
