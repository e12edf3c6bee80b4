"""Which settings of a ``Trainer`` are accepted: whatever is not honoured is refused by name."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

__all__ = ["refuse_num_stages", "refuse_settings"]

_PRECISIONS = ("32-true", "64-true", "bf16-mixed")
# By name, as some callbacks exist only in certain releases of lightning. Subclasses count, too.
_CALLBACKS = {
    "StochasticWeightAveraging": "it averages a copy of the model, of which a rank has a part",
    "WeightAveraging": "it averages a copy of the model, of which a rank has a part",
    "ModelPruning": "it ranks the weights of the whole model, of which a rank has a part",
}


def refuse_settings(trainer: Trainer, module: LightningModule) -> None:
    """Raises if a setting would be ignored.

    Raises:
        ValueError: names the setting, and says what to do instead.
    """
    if not module.automatic_optimization:
        raise ValueError(
            "automatic_optimization=False cannot be honoured: a step runs forward and backward in "
            "one; use dualpipe_ext.TrainingWrapper for a loop of your own"
        )
    if trainer.precision_plugin.precision not in _PRECISIONS:
        raise _refusal(
            f"precision={trainer.precision_plugin.precision!r}", f"use one of {_PRECISIONS}"
        )
    if trainer.strategy._layer_sync is not None:
        raise _refusal(
            "sync_batchnorm=True",
            "it would wait for ranks that have other stages; leave it out",
        )
    for callback in trainer.callbacks:
        for kind in type(callback).__mro__:
            if kind.__name__ in _CALLBACKS:
                raise _refusal(
                    f"callbacks=[{kind.__name__}(...)]",
                    f"{_CALLBACKS[kind.__name__]}; leave it out",
                )


def refuse_num_stages(num_stages: int, num_ranks: int, built: int) -> None:
    """Raises if the ranks cannot be divided into pipelines of so many stages.

    Args:
        num_stages: the number of stages of each pipeline; 0 for one pipeline of all ranks.
        num_ranks: the number of ranks of all pipelines together.
        built: the number of stages into which the module is already cut, or 0.

    Raises:
        ValueError: says the numbers, and what to do instead.
    """
    if num_stages < 0 or (num_stages and num_ranks % num_stages):
        raise ValueError(
            f"DualPipeStrategy(num_stages={num_stages}) has pipelines of {num_stages} ranks, and "
            f"Trainer starts {num_ranks}; choose devices= times num_nodes= as a multiple of num_stages"
        )
    if built and built != (num_stages or num_ranks):
        raise ValueError(
            f"the module was cut into {built} stages by an earlier trainer, and this one has "
            f"pipelines of {num_stages or num_ranks}; make the module anew, or use DualPipeStrategy("
            f"num_stages={built})"
        )


def _refusal(setting: str, reason: str) -> ValueError:
    return ValueError(f"Trainer({setting}) cannot be honoured by DualPipeStrategy: {reason}")
