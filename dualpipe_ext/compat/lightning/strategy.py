"""How Lightning's ``Trainer`` runs the ranks of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dualpipe_ext.compat.batches import BatchPipeline
from dualpipe_ext.compat.lightning.module import DualPipeLightningModule
from dualpipe_ext.compat.lightning.optimizer_states import load_whole_state, save_whole_state
from dualpipe_ext.compat.lightning.refusals import refuse_num_stages, refuse_settings
from dualpipe_ext.compat.ranks import TrainerRanks, through_together, update_together
from dualpipe_ext.compat.whole import refuse_shards, update_model
from dualpipe_ext.host_groups import host_group, reaching
from dualpipe_ext.training.optimizers import refuse_closures

__all__ = ["DualPipeStrategy"]


class DualPipeStrategy(DDPStrategy):  # type: ignore[misc]  # lightning may not be there to check
    """Runs each rank of a pipeline in a process; nothing is wrapped, and all share every batch.

    With more ranks than ``num_stages`` there are replicas: pipelines side by side, each of
    consecutive ranks, which divide the rows of every batch among themselves. Processes are those of
    ``torchrun``, or are started as by ``DDPStrategy``. Loaders are left as they are
    (``use_distributed_sampler`` is off), and torch's generator is set to the first rank's state on
    all ranks. A checkpoint is that of an unsplit run: either kind of run can continue from the
    other's.

    Args:
        start_method: ``"popen"`` runs the script again for each further rank; ``"spawn"`` runs only
            the trainer's own function there, and needs a module that can be pickled.
        timeout: the timeout of the process group, which is over gloo, with NCCL for ranks on GPUs.
            ``DualPipeConfig`` has that of steps.
        num_stages: the number of stages, and of ranks, of each pipeline; by default all ranks form
            one pipeline.
    """

    runs_pipelines = True

    def __init__(
        self,
        start_method: Literal["popen", "spawn"] = "popen",
        timeout: timedelta = timedelta(minutes=30),
        num_stages: int = 0,
    ) -> None:
        super().__init__(start_method=start_method, timeout=timeout)
        self._num_stages = num_stages
        self._guard: RemovableHandle | None = None  # on the model while its values are partly stale

    def setup_environment(self) -> None:
        """Starts the process group.

        Raises:
            ValueError: a setting or a number of ranks that cannot be honoured.
            TypeError: the module is not a ``DualPipeLightningModule``.
        """
        module = self.lightning_module
        if not isinstance(module, DualPipeLightningModule):
            raise TypeError(
                f"DualPipeStrategy trains a DualPipeLightningModule; found {type(module).__name__}"
            )
        refuse_settings(module.trainer, module)
        num_ranks = self.num_nodes * self.num_processes
        built = 0 if module._built is None else module._built.pipeline.num_ranks
        refuse_num_stages(self._num_stages, num_ranks, built)
        is_script = self._start_method == "popen"  # otherwise this process has drawn nothing yet
        with isolate_rng() if is_script else nullcontext():  # as DDP resets generators to the seed
            super().setup_environment()
        module.trainer._accelerator_connector.use_distributed_sampler = False
        world = dist.group.WORLD
        assert world is not None
        state = torch.get_rng_state()
        with reaching("the first rank"):
            dist.broadcast(state, group=host_group(world), group_src=0)
        torch.set_rng_state(state)

    def _get_process_group_backend(self) -> str:
        """Adds gloo where Lightning would use only NCCL: ranks exchange host memory, too."""
        return "cpu:gloo,cuda:nccl" if self.root_device.type == "cuda" else "gloo"

    def make_ranks(self) -> TrainerRanks:
        """Makes the ranks of this pipeline and of those beside it; every rank calls it."""
        num_ranks = dist.get_world_size()
        if self._num_stages in (0, num_ranks):
            return TrainerRanks.of()
        shape = num_ranks // self._num_stages, self._num_stages
        return TrainerRanks.of(mesh=init_device_mesh("cpu", shape, mesh_dim_names=("dp", "pp")))

    def setup(self, trainer: Any) -> None:
        """Makes the optimizers; the module has already cut its model.

        Raises:
            TypeError: an optimizer needs a closure, or keeps its state in shards.
        """
        Strategy.setup(self, trainer)  # DDP's would wrap the module, or make all ranks equal
        for optimizer in self.optimizers:
            own = getattr(optimizer, "optimizer", optimizer)
            refuse_closures(own)
            refuse_shards(own)
        if trainer.state.fn == "fit" and self._built.pipeline.num_ranks > 2:
            model = self.lightning_module.model
            self._guard = model.register_forward_pre_hook(_refuse_stale_values)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Any = None,
        **options: Any,
    ) -> Any:
        """Takes a step, after summing accumulated gradients over all copies of each stage.

        Raises:
            Exception: what the optimizer raised on this rank.
            PipelineError: the optimizer of another rank raised.
        """
        result = closure()
        if self.lightning_module.trainer.accumulate_grad_batches > 1:
            self._built.sync_gradients()
        step = partial(super().optimizer_step, optimizer, lambda: result, model, **options)
        return update_together(self._built.pipeline, self._built.ranks.replicas, step)

    @property
    def _built(self) -> BatchPipeline:
        built: BatchPipeline = self.lightning_module.dualpipe_wrapper
        return built

    # Checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the state of the whole model; every rank calls it."""
        update_model(self.lightning_module.model, self._built.pipeline, self._built.ranks)
        state: dict[str, Any] = self.lightning_module.state_dict()
        return state

    def save_checkpoint(self, *args: Any, **options: Any) -> None:
        """Writes a checkpoint on the first rank, as Lightning does; every rank calls it.

        Raises:
            Exception: what went wrong, on the first rank.
            PipelineError: the same, on the others.
        """
        save = partial(super().save_checkpoint, *args, **options)
        through_together(self._built.ranks, save, "could not write the checkpoint")

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns, on the first rank, the optimizer's state as of an unsplit run; all call it."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        built = self._built
        if built.ranks.replicas.index:
            return optimizer.state_dict()  # the first one has all of it
        return save_whole_state(
            optimizer, self.lightning_module.model, built.pipeline, built.ranks.host
        )

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads this rank's part into its optimizers."""
        model = self.lightning_module.model
        states = checkpoint["optimizer_states"]
        for optimizer, state in zip(self.optimizers, states, strict=True):
            load_whole_state(optimizer, model, state, self._built.ranks.host)

    def teardown(self) -> None:
        """Gives the module the values of all stages, unless an error ended the training."""
        if self._guard is not None:
            self._guard.remove()
        module = self.lightning_module
        if (
            isinstance(module, DualPipeLightningModule)
            and module.trainer.state.status != TrainerStatus.INTERRUPTED
        ):
            update_model(module.model, self._built.pipeline, self._built.ranks)
        super().teardown()

    # What would place or wrap the module

    def model_to_device(self) -> None:
        """Moves only this rank's stages."""
        self._built.pipeline.to(self.root_device)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return model


def _refuse_stale_values(model: nn.Module, _: Any) -> None:
    raise ValueError(
        f"{type(model).__name__} was called while it is trained: on this rank it has new values of "
        f"two stages alone; outputs over the pipeline are those of predict_step(batch, batch_idx), "
        f"on every rank"
    )
