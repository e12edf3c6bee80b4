"""The model as a training loop sees it: cut into a pipeline, or whole for comparison."""

from collections.abc import Iterable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualpipe_ext import Pipeline
from gpt.model import GPTStage, even_cut, loss_fn
from gpt.options import Options


class Model(Protocol):
    """What the training loop needs of a model."""

    modules: list[GPTStage]

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters that this process trains."""

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return each micro-batch's loss; with gradients enabled, leave those of their mean."""

    def clip(self, max_norm: float) -> float:
        """Clip the gradient's norm and return what it was."""


class PipelinedGPT:
    """This rank's stages, run by the engine."""

    def __init__(self, options: Options, rank: int) -> None:
        plan = options.plan()
        cut = even_cut(options.model.layers, plan.num_stages)
        stages = plan.stages_of(rank)
        self.modules = [GPTStage(options.model, cut[stage], options.seed) for stage in stages]
        self.pipeline = Pipeline(self.modules, options.schedule)
        self.pipeline.register_before_backward_hook(lambda loss, _: loss / options.microbatches)
        self.num_chunks = options.microbatches
        self.entering = plan.microbatches_at(0, rank)
        self.leaving = plan.microbatches_at(plan.num_stages - 1, rank)

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of this rank's stages."""
        return self.pipeline.parameters()

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Run a step; every rank gets the losses of all micro-batches.

        Every rank is given the whole batch. It uses the inputs of the micro-batches that enter
        the pipeline here and the targets of those that leave it here.
        """
        losses, _ = self.pipeline.step(
            self._rows(tokens, self.entering),
            num_chunks=self.num_chunks,
            criterion=loss_fn,
            labels=(self._rows(targets, self.leaving),),
            sync_gradients=torch.is_grad_enabled(),
        )
        everywhere = torch.zeros(self.num_chunks)
        if losses is not None:
            everywhere[self.leaving] = losses
        dist.all_reduce(everywhere)
        return everywhere

    def clip(self, max_norm: float) -> float:
        """Clip by the norm of the whole model's gradient, every parameter counted once."""
        return float(self.pipeline.clip_grad_norm_(max_norm))

    def bubbles(self) -> tuple[float, float]:
        """Return the planned and the measured bubble of the last step, averaged over ranks."""
        stats = self.pipeline.stats()
        shares = torch.tensor([stats.planned_bubble, stats.measured_bubble])
        dist.all_reduce(shares)
        planned, measured = (shares / self.pipeline.num_ranks).tolist()
        return planned, measured

    def _rows(self, batch: Tensor, microbatches: list[int]) -> Tensor | None:
        if not microbatches:
            return None
        chunks = batch.chunk(self.num_chunks)
        return torch.cat([chunks[index] for index in microbatches])


class UnsplitGPT:
    """The same model in one piece, run micro-batch by micro-batch."""

    def __init__(self, options: Options) -> None:
        self.modules = [GPTStage(options.model, range(options.model.layers), options.seed)]
        self.num_chunks = options.microbatches

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return all parameters."""
        return self.modules[0].parameters()

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Run all micro-batches, one after the other."""
        losses = []
        pairs = zip(tokens.chunk(self.num_chunks), targets.chunk(self.num_chunks), strict=True)
        for microbatch, target in pairs:
            loss = loss_fn(self.modules[0](microbatch), target)
            if torch.is_grad_enabled():
                (loss / self.num_chunks).backward()
            losses.append(loss.detach())
        return torch.stack(losses)

    def clip(self, max_norm: float) -> float:
        """Clip by the norm of the gradient."""
        return float(nn.utils.clip_grad_norm_(self.parameters(), max_norm))
