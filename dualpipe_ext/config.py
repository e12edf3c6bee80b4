"""Settings of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DualPipeConfig"]

MirrorInit = Literal["broadcast", "check", "none"]


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
    seed: int | None = None

    def __post_init__(self) -> None:
        _at_least("num_microbatches", self.num_microbatches, 0)
        _at_least("lookahead", self.lookahead, 0)
        _at_least("bucket_bytes", self.bucket_bytes, 1)
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
