"""Optimizers and schedulers of the parameters that one rank holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dualpipe_ext.pipeline import Pipeline

__all__ = [
    "MakeOptimizer",
    "MakeScheduler",
    "Recipe",
    "make_optimizer",
    "make_scheduler",
    "refuse_closures",
    "stage_options",
    "step_scheduler",
]

MakeOptimizer = Callable[..., Optimizer]
MakeScheduler = Callable[..., LRScheduler]


@dataclass(frozen=True)
class Recipe:
    """How to make an optimizer or scheduler, or one that is already made.

    Attributes:
        given: a class or function, or what it would make.
        options: further arguments of the class or function.
    """

    given: Any
    options: Mapping[str, Any] | None = None

    def make(self, argument: Any) -> Any:
        """Calls ``given`` with ``argument`` first, if it is callable; otherwise returns it."""
        return self.given(argument, **(self.options or {})) if callable(self.given) else self.given

    def ready_made(self, kind: type) -> Any:
        """Returns ``given`` if it is of this kind, otherwise ``None``.

        Raises:
            ValueError: it is, and there are options for it.
        """
        if not isinstance(self.given, kind):
            return None
        if self.options:
            raise ValueError(
                f"options {', '.join(self.options)} were given for a {type(self.given).__name__} that "
                f"is already made; give its class, or make it with them"
            )
        return self.given


def make_optimizer(
    recipe: Recipe,
    parameters: Sequence[nn.Parameter],
    device: torch.device,
) -> Optimizer:
    """Makes the optimizer of a rank.

    Args:
        recipe: a class, or a function of a list of parameters; or an optimizer of the whole model's
            parameters, which is changed in place to hold only this rank's.
        parameters: all parameters of the rank. If none of them is trained, a placeholder with one
            element is, so that learning rates and gradient scales develop alike on every rank.
        device: the device of the rank's stages.

    Raises:
        ValueError: an optimizer of other parameters.
        TypeError: something else was given or returned, or an optimizer that needs a closure.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    placeholder = None if trained else nn.Parameter(torch.zeros(1, device=device))
    if placeholder is not None:
        trained = [placeholder]
    optimizer = recipe.ready_made(Optimizer) or recipe.make(trained)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer= must be a class of torch.optim, a function that makes one of a list of "
            f"parameters, or an optimizer; found {type(optimizer).__name__}"
        )
    refuse_closures(optimizer)
    _narrow(optimizer, parameters, placeholder)
    return optimizer


def refuse_closures(optimizer: Optimizer) -> None:
    """Raises TypeError for an optimizer that has to run the model itself."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("LBFGS runs the model several times a step; use another optimizer")


def make_scheduler(recipe: Recipe, optimizer: Optimizer) -> LRScheduler | None:
    """Makes the scheduler of a rank's optimizer, or takes the one given; ``None`` if there is none.

    Raises:
        ValueError: a scheduler of another optimizer.
        TypeError: something else was given or returned.
    """
    if recipe.given is None:
        return None
    scheduler = recipe.ready_made(LRScheduler) or recipe.make(optimizer)
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(
            f"scheduler= must be a class of torch.optim.lr_scheduler, a function that makes one of "
            f"an optimizer, or a scheduler; found {type(scheduler).__name__}"
        )
    if scheduler.optimizer is not optimizer:
        raise ValueError(
            "the scheduler is one of another optimizer; give a function, such as "
            "scheduler=lambda optimizer: CosineAnnealingLR(optimizer, T_max=1000)"
        )
    return scheduler


def stage_options(optimizer: Optimizer, pipeline: Pipeline) -> dict[str, list[str]]:
    """Returns, by stage, the options with which each parameter of mirrored stages is trained.

    They must be the same for both copies of a stage; those of different stages may differ.
    """
    of_parameter = {
        id(parameter): _shown(group)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {
        str(stage): [
            f"{name} trained with {of_parameter.get(id(parameter), 'nothing')}"
            for name, parameter in module.named_parameters()
        ]
        for stage, module in zip(pipeline.stages, pipeline.module, strict=True)
        if pipeline.is_mirrored
    }


def _shown(group: Mapping[str, Any]) -> str:
    """Shows numbers, strings and short tuples of numbers; other options may be long, or objects."""
    values = {
        name: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        for name, value in group.items()
    }
    return ", ".join(
        f"{name}={value}"
        for name, value in values.items()
        if isinstance(value, (bool, int, float, str)) or _are_numbers(value)
    )


def _are_numbers(value: object) -> bool:
    is_short = isinstance(value, tuple) and len(value) <= 4
    return is_short and all(isinstance(each, (int, float)) for each in value)  # type: ignore[attr-defined]


def step_scheduler(scheduler: LRScheduler | None, loss: float) -> None:
    """Steps a scheduler; one that depends on the loss gets it, as all ranks know it."""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(loss)
    elif scheduler is not None:
        scheduler.step()


def _narrow(
    optimizer: Optimizer, own: Sequence[nn.Parameter], placeholder: nn.Parameter | None
) -> None:
    """Keeps only this rank's parameters, including frozen ones, in the groups and in the state."""
    kept = {id(parameter) for parameter in (*own, placeholder)}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in kept]
    for parameter in [p for p in optimizer.state if id(p) not in kept]:
        del optimizer.state[parameter]
    found = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if placeholder is not None and id(placeholder) not in found:
        optimizer.param_groups[0]["params"].append(placeholder)
    elif not found:
        raise ValueError(
            "the optimizer holds none of this rank's parameters; make it over all those of the very "
            "model that TrainingWrapper is given (freeze what it must not train, by "
            "requires_grad_(False)), or pass a function, such as "
            "optimizer=lambda parameters: AdamW(parameters, lr=1e-3)"
        )
