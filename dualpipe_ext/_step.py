"""What the engine calls back during one step: the user's modules, criterion and hooks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from dualpipe_ext.gradients import MainGrads
from dualpipe_ext.microbatches import Chunk, Joined, gather

__all__ = ["LossHooks", "Step"]

Outputs = list[Tensor | None]
Criterion = Callable[..., Tensor]
Method = TypeVar("Method", bound=Callable[..., Any])
BeforeBackward = Callable[[Tensor, int], "Tensor | None"]
AfterForward = Callable[[Tensor, "Sequence[Tensor | None]", int], None]


@dataclass
class LossHooks:
    """Hooks that are called on the ranks that compute losses, in the order of registration."""

    # OrderedDict, as a RemovableHandle holds a weak reference, which a plain dict does not allow.
    before_backward: OrderedDict[int, BeforeBackward] = field(default_factory=OrderedDict)
    after_forward: OrderedDict[int, AfterForward] = field(default_factory=OrderedDict)


def _notes_mistakes(method: Method) -> Method:
    """Notes what a method of :class:`Step` itself raises, as opposed to the user's code."""

    @wraps(method)
    def noting(self: Step, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except (ValueError, TypeError) as error:
            if error is not self.error:
                self.mistake = error
            raise

    return cast(Method, noting)


@dataclass(kw_only=True)
class Step:
    """One step of one rank. ``forward`` and ``overlapped`` are called by the engine."""

    modules: dict[int, nn.Module]  # by stage
    main_grads: MainGrads  # of the parameters whose gradients are accumulated there
    last_stage: int
    inputs: dict[int, Chunk]  # by micro-batch, where it enters here
    labels: dict[int, Chunk]  # by micro-batch, where it leaves here
    criterion: Criterion | None
    hooks: LossHooks
    batch_dim: int
    training: bool
    keep_outputs: bool
    reseed: Callable[[int, int], None] | None = None  # before a forward of (stage, micro-batch)
    overlapped_function: Callable[..., Any] | None = None

    losses: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Outputs] = field(default_factory=dict)
    error: BaseException | None = None  # what the user's code raised
    mistake: BaseException | None = None  # what this class raised: the caller is at fault

    @_notes_mistakes
    def forward(
        self, stage: int, microbatch: int, inputs: list[Tensor | None]
    ) -> tuple[Outputs, Tensor | None]:
        """Runs a stage; returns (what to send to the next stage, the loss to differentiate)."""
        stage_inputs = self.inputs[microbatch] if stage == 0 else inputs
        if self.reseed is not None:
            self.reseed(stage, microbatch)
        outputs = _as_list(self._user(self.modules[stage], *stage_inputs), stage)
        if stage != self.last_stage:
            return outputs, None
        loss = self._loss(microbatch, outputs)
        return [], self._leave(microbatch, outputs, loss)

    @_notes_mistakes
    def overlapped(
        self,
        forward: tuple[int, int, list[Tensor | None]],
        backward: tuple[int, int, Tensor | None, list[Tensor | None], list[Tensor | None]],
    ) -> tuple[Outputs, Tensor | None]:
        """Runs the stage's own overlapped function, which has the reference's signature."""
        assert self.overlapped_function is not None
        stage0, microbatch0, received = forward
        stage1, _, loss1, outputs1, output_grads1 = backward
        inputs0 = self.inputs[microbatch0] if stage0 == 0 else received
        last = stage0 == self.last_stage
        if self.reseed is not None:
            self.reseed(stage0, microbatch0)
        pairs = [
            (output, grad)
            for output, grad in zip(outputs1, output_grads1, strict=True)
            if output is not None and grad is not None
        ]
        returned, loss0 = self._user(
            self.overlapped_function,
            self.modules[stage0],
            list(inputs0),
            self.criterion if last else None,
            list(self.labels.get(microbatch0, ())) if last else [],
            self.modules[stage1],
            loss1,
            [output for output, _ in pairs],
            [grad for _, grad in pairs],
        )
        outputs = _as_list(returned, stage0)
        if not last:
            return outputs, None
        return [], self._leave(microbatch0, outputs, self._scalar(loss0, outputs))

    def loss(self) -> Tensor | None:
        """Returns the losses of this rank's micro-batches, in order; ``None`` if there are none."""
        if not self.losses:
            return None
        return torch.stack([self.losses[i] for i in sorted(self.losses)])

    def gathered_outputs(self) -> Joined | tuple[Joined, ...]:
        """Returns the joined outputs of this rank's micro-batches; ``None`` if there are none."""
        if not self.outputs:
            return None
        return gather([self.outputs[i] for i in sorted(self.outputs)], self.batch_dim)

    def _loss(self, microbatch: int, outputs: Outputs) -> Tensor | None:
        if self.criterion is None:
            return None
        loss = self._user(self.criterion, *outputs, *self.labels.get(microbatch, ()))
        return self._scalar(loss, outputs)

    def _leave(self, microbatch: int, outputs: Outputs, loss: Tensor | None) -> Tensor | None:
        """Keeps the results of a micro-batch that has left the last stage, and runs the hooks."""
        if self.keep_outputs:
            self.outputs[microbatch] = [None if x is None else x.detach() for x in outputs]
        if loss is None:
            return None
        self.losses[microbatch] = loss.detach().clone()  # hooks may change the loss in place
        for log in self.hooks.after_forward.values():
            self._user(log, loss.detach(), outputs, microbatch)
        if not self.training:
            return None
        for hook in self.hooks.before_backward.values():
            changed = self._user(hook, loss, microbatch)
            loss = loss if changed is None else self._scalar(changed, outputs)
        return loss

    def _scalar(self, loss: object, outputs: Outputs) -> Tensor:
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"the criterion must return a scalar tensor; it returned {type(loss).__name__}"
            )
        if loss.numel() != 1:
            raise ValueError(
                f"the criterion must return a scalar; it returned shape {tuple(loss.shape)}; "
                f"reduce it, for example with .mean()"
            )
        needs_grad = any(x is not None and x.requires_grad for x in outputs)
        if self.training and needs_grad and not loss.requires_grad:
            raise ValueError(
                "the criterion returned a loss without a graph, so nothing can be trained; "
                "remove detach(), item() or no_grad() from the criterion"
            )
        # Not a view: a user's overlapped function may detach the loss in place.
        return loss if loss.dim() == 0 else loss.sum()

    def forget_errors(self) -> None:
        """Drops errors: their frames refer to this step, and would keep its pipeline alive."""
        self.error = self.mistake = None

    def _user(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls the user's code and remembers what it raised, to tell it from our own errors."""
        try:
            return function(*arguments)
        except BaseException as error:
            self.error = error
            raise


def _as_list(outputs: object, stage: int) -> Outputs:
    if outputs is None or isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, (tuple, list)):
        for output in outputs:
            if output is not None and not isinstance(output, Tensor):
                raise TypeError(
                    f"stage {stage} returned a {type(output).__name__} among its outputs; stages "
                    f"return a tensor, or a tuple of tensors and None"
                )
        return list(outputs)
    raise TypeError(
        f"stage {stage} returned a {type(outputs).__name__}; stages return a tensor, or a tuple "
        f"of tensors and None"
    )
