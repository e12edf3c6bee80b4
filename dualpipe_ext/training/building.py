"""Makes the pipeline of a rank from a whole model, in step with the other ranks and replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dualpipe_ext._handshake import agree
from dualpipe_ext.config import DualPipeConfig
from dualpipe_ext.groups import PipelineGroup
from dualpipe_ext.pipeline import Pipeline
from dualpipe_ext.training.cutting import OwnPart, compare_settings, measured_costs, own_part
from dualpipe_ext.training.replicas import Replicas
from dualpipe_ext.training.setup import seeded, warn_of_other_models, weights_digest

__all__ = ["Adopt", "build_pipeline"]

# Takes this rank's part of the model; returns its stages where they are trained, and what ranks
# compare (:func:`dualpipe_ext._handshake.agree`).
Adopt = Callable[[OwnPart], tuple[Sequence[nn.Module], dict[str, Any]]]


def build_pipeline(
    model: nn.Module | Sequence[nn.Module],
    config: DualPipeConfig,
    group: PipelineGroup,
    replicas: Replicas,
    *,
    check: Callable[[], None],
    adopt: Adopt,
    sample_inputs: Sequence[Tensor | None] | None = None,
    batch_dim: int = 0,
) -> Pipeline:
    """Cuts a model and makes the pipeline of this rank; all ranks of all replicas call it.

    Args:
        model: as for :class:`dualpipe_ext.TrainingWrapper`.
        config: the same on every rank.
        group: the ranks.
        replicas: the pipelines side by side.
        check: raises on what can be wrong before the model is cut.
        adopt: does what else may fail on one rank.
        sample_inputs: as for :class:`dualpipe_ext.TrainingWrapper`.
        batch_dim: the dimension of the rows.

    Raises:
        ValueError, TypeError: an unsuitable model, or ranks that differ.
        Exception: what ``check`` or ``adopt`` raised on this rank.
        PipelineError: another rank could not be constructed.
    """

    def checked() -> dict[str, Any]:
        check()
        return {"stages": {}}

    compare_settings(model, config, group, replicas)
    replicas.together(lambda: agree(group, config.timeout, checked))
    # Before copies of a stage are made equal, and before a model without values is given memory,
    # with arbitrary content.
    weights = replicas.together(lambda: weights_digest(model))
    costs = measured_costs(model, config, sample_inputs, group, replicas)
    stages: list[nn.Module] = []

    def cut() -> dict[str, Any]:
        part = own_part(model, config, costs, group, show=replicas.index == 0)
        adopted, told = adopt(part)
        stages.extend(adopted)
        return told

    with replicas.telling_failures():
        agree(group, config.timeout, cut)
        warn_of_other_models(weights, group, config.timeout)
        own = seeded(config, group, replicas.index)
        pipeline = Pipeline(stages, own.schedule, batch_dim, group, config=own)
    replicas.begin(pipeline)
    return pipeline
