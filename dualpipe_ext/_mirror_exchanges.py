"""What the two copies of each stage exchange outside of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from torch import Tensor

from dualpipe_ext import _C
from dualpipe_ext._buffers import WideBuffer, assign_means, wide_copies
from dualpipe_ext._mirrors import MirroredStages

__all__ = ["MirrorExchanges", "tell"]


def tell(engine: _C.Engine, error: BaseException, *, is_step: bool) -> None:
    """Tells the other ranks that this one does not take part in what all ranks run now."""
    engine.fail(f"{type(error).__name__}: {error}", is_step)


class MirrorExchanges:
    """Exchanges between this rank and the one that holds the other copies of its stages.

    Every rank of the pipeline calls the same. If one cannot, all ranks get its error: that one as
    it was raised, the others in a ``PipelineError``.

    Args:
        engine: runs the exchanges.
        mirrors: the stages of this rank.
        stages: their numbers.
        bucket_bytes: how much travels in one message.
    """

    def __init__(
        self,
        engine: _C.Engine,
        mirrors: MirroredStages,
        stages: Sequence[int],
        bucket_bytes: int,
    ) -> None:
        self._engine = engine
        self._mirrors = mirrors
        self._stages = sorted(stages)
        self._bucket_bytes = bucket_bytes

    def gradient_sum(self) -> _C.MirrorExchange:
        """Returns the exchange that sums gradients, for a step to run."""
        return self._mirrors.gradient_sum(self._engine, self._bucket_bytes)

    def sum_gradients(self, check: Callable[[], None]) -> None:
        """Adds the gradients of the two copies; ``check`` is called before."""
        with ExitStack() as stack:

            def prepare() -> _C.MirrorExchange:
                check()
                exchange = self.gradient_sum()
                stack.enter_context(self._mirrors.lending_shards())
                return exchange

            self._run(prepare, "sync_gradients()")

    def copy(self) -> None:
        """Overwrites parameters and buffers of the second copies with those of the first."""
        self._run(lambda: self._mirrors.copy(self._engine, self._bucket_bytes), "sync_parameters()")

    def average_buffers(self) -> None:
        """Sets both copies of each floating-point or complex buffer to the same mean."""
        wide: list[WideBuffer] = []

        def prepare() -> _C.MirrorExchange:
            by_stage = self._mirrors.by_stage(lambda module: wide_copies(module.buffers()))
            wide.extend(pair for _, own in by_stage for pair in own)
            totals = [(stage, [total for _, total in own]) for stage, own in by_stage]
            return self._mirrors.sum_of(self._engine, totals, self._bucket_bytes)

        self._run(prepare, "sync_buffers(), which saving and evaluating call as well")
        assign_means(wide, 2)

    def swap(self, own: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """Sends tensors to the mirror, and returns those that it has sent, shaped as ``like``."""
        # Summing gives a gradient that only one copy of a stage has to the other copy, bit for bit.
        taken = [tensor.detach() for tensor in like]
        self._run(
            lambda: self._mirrors.swap(self._engine, own, taken, self._bucket_bytes),
            "swap_with_mirror()",
        )
        return [tensor.grad for tensor in taken if tensor.grad is not None]

    def _run(self, prepare: Callable[[], _C.MirrorExchange], call: str) -> None:
        try:
            exchange = prepare()
        except BaseException as error:  # the other ranks must not wait for this one
            tell(self._engine, error, is_step=False)
            raise
        self._engine.exchange(exchange, self._stages, call)
