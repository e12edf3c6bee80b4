"""Refuses modules whose call is more than the forward of their class: stages would not run it."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["check_call"]


def check_call(module: nn.Module, name: str = "") -> None:
    """Raises unless a call of a module is the forward of its class and nothing more.

    For modules that cutting copies or traces: what is attached to the object itself would run the
    whole model in every stage, or in none. Layers stay the same objects, so their calls may differ.

    Args:
        module: the module that is copied or traced.
        name: its name in the model; empty for the model itself.

    Raises:
        ValueError: it has hooks, a compiled call or a forward of its own, or is a wrapper; says how
            to undo that.
    """
    if problem := _problem(module):
        place = f"{name or 'the model'} ({type(module).__name__})"
        raise ValueError(problem.format(place=place))


def _problem(module: nn.Module) -> str:
    own = vars(module)
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        return (
            "{place} wraps what it was given, and hides it from the cut: pass what is in it, "
            "model.module; the gradients of pipelines side by side are summed where "
            "TrainingWrapper is given mesh= or replica_group="
        )
    if _is_of_peft(module):
        return (
            "{place} wraps the model that has its layers of peft in it, and hides it from the cut: "
            "pass model.get_base_model(), as docs/your_model.md shows"
        )
    if "_orig_mod" in module._modules:
        return (
            "{place} is what torch.compile() returned: pass the model that was compiled, "
            "model._orig_mod, and compile layers, as in layer.compile()"
        )
    if "_hf_hook" in own:
        return (
            "accelerate has put hooks around the forward of {place}, which is cut: call "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True) before, or load the "
            "model without device_map"
        )
    if own.get("_compiled_call_impl") is not None:
        return (
            "{place} was compiled, and is cut, so that no stage would call what was compiled: cut "
            "the model before, and compile layers, as in layer.compile()"
        )
    if "forward" in own and not _is_of_class(own["forward"], module):
        return (
            "the forward of {place} was replaced on this one object (x.forward = ...), and would "
            "run the whole model in a stage, or in none: replace it in the class, or `del "
            "x.forward` before the model is cut; layers may have forwards of their own"
        )
    if any(_hooks(module)):
        return (
            "hooks are registered on {place}, which is cut and is no stage's module any more: "
            "register them on layers, or after training"
        )
    return ""


def _is_of_peft(module: nn.Module) -> bool:
    return any(
        kind.__name__ == "PeftModel" and kind.__module__.startswith("peft.")
        for kind in type(module).__mro__
    )


def _is_of_class(forward: object, module: nn.Module) -> bool:
    """Whether this is the bound method of the class, which accelerate's hooks leave behind."""
    of_class = getattr(forward, "__func__", None) is type(module).forward
    return of_class and getattr(forward, "__self__", None) is module


def _hooks(module: nn.Module) -> tuple[object, ...]:
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
