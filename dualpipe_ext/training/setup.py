"""Makes a configuration for a whole model, and prepares the stages of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dualpipe_ext._advice import warn_caller
from dualpipe_ext._random import microbatch_seed
from dualpipe_ext.adapters import Partition, get_model_adapter
from dualpipe_ext.config import Balance, DualPipeConfig
from dualpipe_ext.groups import PipelineGroup
from dualpipe_ext.schedule import PlannerInfo, plan
from dualpipe_ext.training.cutting import planner_of
from dualpipe_ext.training.sampled_digest import sampled_digest

__all__ = [
    "input_names",
    "place_stages",
    "predicts_next_token",
    "seeded",
    "setup_dual_pipe",
    "warn_of_other_models",
    "weights_digest",
]


def setup_dual_pipe(model: nn.Module, num_stages: int, **settings: Any) -> DualPipeConfig:
    """Returns a configuration for training a model, after checking that it can be cut.

    Unless ``settings`` say otherwise, everything is overlapped, activations are recomputed in the
    backward pass, and there are twice as many micro-batches as stages: the fewest that DualPipe
    supports. With more of them, the bubble is a smaller share of the step.

    Args:
        model: a model with an adapter (:func:`dualpipe_ext.adapters.get_model_adapter`). It is not
            changed.
        num_stages: the number of stages; for DualPipe, the number of ranks.
        settings: further settings of :class:`DualPipeConfig`, by name.

    Raises:
        ValueError: the model cannot be cut into so many stages, the schedule does not support the
            number of micro-batches, or a setting is unknown or has a value that is not allowed.
        TypeError: ``model`` is not a module, or a setting has the wrong type.
    """
    chosen = {
        "num_stages": num_stages,
        "overlap_strategy": "full",
        "memory_optimization": "activation_checkpoint",
    }
    config = DualPipeConfig.from_dict({**chosen, **settings})
    planner = planner_of(config.schedule)
    # Whether it can be cut does not depend on what is evened out; ranks measure together later.
    balance: Balance = "parameters" if config.evens_out else config.balance
    adapter = get_model_adapter(model)
    adapter.partition(num_stages, balance, paired=planner.placement != "loop", show=False)
    if "num_microbatches" not in settings:
        config = replace(config, num_microbatches=2 * num_stages)
    _check_microbatches(config, planner)
    return config


def _check_microbatches(config: DualPipeConfig, planner: PlannerInfo) -> None:
    """Raises if the schedule does not support them, as far as its number of ranks is known."""
    if config.num_microbatches and planner.stages_per_rank:
        one_copy = 1 if planner.placement == "bidirectional" else planner.stages_per_rank
        num_ranks = max(2, config.num_stages // one_copy)
        plan(config.schedule, num_ranks, config.num_microbatches, planner.stages_per_rank)


def weights_digest(model: nn.Module | Sequence[nn.Module]) -> str:
    """Returns what :func:`warn_of_other_models` compares; empty for stages or without values."""
    if isinstance(model, nn.Module) and not _is_empty(model):
        return str(sampled_digest(model.parameters()))
    return ""


def warn_of_other_models(own: str, group: PipelineGroup, timeout: float) -> None:
    """Warns on the first rank if whole models differ between ranks; all ranks call it.

    This is not an error: a rank may have read the weights of only its own stages.

    Args:
        own: the :func:`weights_digest` of this rank's model.
        group: the ranks.
        timeout: seconds to wait for them.

    Raises:
        PipelineError: a rank did not join.
    """
    digests = group.all_gather(own, timeout)
    known = [rank for rank, found in enumerate(digests) if found]
    others = [rank for rank in known if digests[rank] != digests[known[0]]]
    if others and group.rank == 0:
        warn_caller(
            f"the model of rank {known[0]} has other weights than that of {_ranks(others)}, and "
            f"stages of both would be trained as one model; call torch.manual_seed() before the "
            f"model is made, or read the same weights on every rank; nothing is wrong if "
            f"load_checkpoint() follows"
        )


def input_names(stages: Sequence[nn.Module]) -> tuple[str, ...] | None:
    """Returns the names of what the first stage takes, if an adapter made the stages."""
    return next((stage.plan.inputs for stage in stages if isinstance(stage, Partition)), None)


def predicts_next_token(stages: Sequence[nn.Module]) -> bool:
    """Whether the stages are of a causal language model, as far as an adapter knows."""
    return any(stage.plan.is_causal for stage in stages if isinstance(stage, Partition))


def seeded(config: DualPipeConfig, group: PipelineGroup, replica: int) -> DualPipeConfig:
    """Returns the configuration with a seed, the same on all ranks of a pipeline.

    Every rank calls it. Ranks are seeded alike to make the same model and the same batches, so
    without a seed both copies of a stage, in all replicas, would drop the same units of different
    rows. Ranks that are threads share one generator, for which a seed cannot hold: their
    configuration stays as it is.

    Args:
        config: the configuration; without a seed, that of the first rank's generator is used.
        group: the ranks.
        replica: the number of this pipeline among those side by side.

    Raises:
        PipelineError: a rank did not join within the configured time.
    """
    if group.are_threads:
        return config
    seed = torch.initial_seed() if config.seed is None else config.seed
    own = microbatch_seed(seed, 0, 0, replica) if replica else seed
    return replace(config, seed=int(group.all_gather(str(own), config.timeout)[0]))


def place_stages(
    stages: Sequence[nn.Module], device: torch.device | str | None
) -> Sequence[nn.Module]:
    """Moves a rank's stages to a device; those without values are given memory there.

    Raises:
        ValueError: parameters have no values, and no device is given.
    """
    if device is None:
        if any(_is_empty(stage) for stage in stages):
            raise ValueError(
                "the model's parameters are on the meta device; give TrainingWrapper the device "
                "where they are to be, and values by load_checkpoint() or import_pretrained()"
            )
        return stages
    for stage in stages:
        if _is_empty(stage):
            stage.to_empty(device=device)
        else:
            stage.to(device)
    for stage in stages:
        if isinstance(stage, Partition) and stage.plan.ties and len(stages) > 1:
            stage.mirror()  # shares again what the two stages of a rank share
    return stages


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _is_empty(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())
