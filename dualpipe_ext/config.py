"""Settings of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DualPipeConfig"]

MirrorInit = Literal["broadcast", "check", "none"]
Transport = Literal["host", "nccl"]


@dataclass(frozen=True, kw_only=True)
class DualPipeConfig:
    """How the engine runs a pipeline. The same on every rank.

    Attributes:
        num_microbatches: used by ``step`` where ``num_chunks`` is left out; 0: it must be given.
        lookahead: computations ahead of its use at which a receive is posted. More hides more
            latency and holds more receive buffers.
        timeout: seconds that a rank waits for one message, or for the others at construction,
            before the step fails on all ranks.
        bucket_bytes: mirrored gradients are exchanged in pieces of about this size.
        mirror_init: what makes the two copies of a stage equal at construction: ``"broadcast"``
            (the rank with the stage's own number wins), ``"check"`` (differing copies are a
            ``ValueError``) or ``"none"``.
        split_weight_gradients: defer the weight gradients of ``nn.Linear`` to the W of the
            schedule. Off: everything is computed in I, correctly and with a larger bubble.
        transport: what messages between stages travel over: ``"host"``, the memory of the host
            and the process group's backend for it, whatever device the stages are on; or
            ``"nccl"``, from GPU to GPU, for stages on CUDA. The latter has not run on a GPU yet.
        nccl_max_ctas: thread blocks that a message over NCCL may take from computation; 0: as many
            as NCCL likes.
        dynamic_shapes: over NCCL, describe each message to its receiver. Needed where what a stage
            returns changes its shape or type from step to step with equal inputs.
        use_overlapped: run a stage's own ``overlapped_forward_backward`` where it has one.
        seed: reseeds torch before every stage's forward from (seed, step, stage, micro-batch), so
            that dropout does not depend on the number of ranks or the schedule
            (:func:`dualpipe_ext.microbatch_seed`). ``None``: random numbers are the caller's.
            For ranks that are processes: threads share torch's one generator and disturb it.
    """

    num_microbatches: int = 0
    lookahead: int = 2
    timeout: float = 600.0
    bucket_bytes: int = 4 * 1024 * 1024
    mirror_init: MirrorInit = "broadcast"
    split_weight_gradients: bool = True
    use_overlapped: bool = True
    transport: Transport = "host"
    nccl_max_ctas: int = 1
    dynamic_shapes: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        _at_least("num_microbatches", self.num_microbatches, 0)
        _at_least("lookahead", self.lookahead, 0)
        _at_least("bucket_bytes", self.bucket_bytes, 1)
        _at_least("nccl_max_ctas", self.nccl_max_ctas, 0)
        if self.transport not in ("host", "nccl"):
            raise ValueError(f"transport={self.transport!r}: choose 'host' or 'nccl'")
        if not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout}: it is in seconds and must be above 0")
        if self.mirror_init not in ("broadcast", "check", "none"):
            raise ValueError(
                f"mirror_init={self.mirror_init!r}: choose 'broadcast', 'check' or 'none'"
            )


def _at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: it must be an int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}={value}: it must be at least {least}")
