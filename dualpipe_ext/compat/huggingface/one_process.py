"""Makes accelerate see a single process, as all ranks share every batch."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

__all__ = ["show_one_process"]


def show_one_process(args: Any, number: int) -> None:
    """Keeps accelerate from dividing batches among the ranks and from wrapping the model.

    Ranks still know their numbers: the first one writes and logs. The state belongs to accelerate,
    and applies to the whole process.

    Args:
        args: the training arguments, which hold accelerate's state.
        number: this rank's number among those of all replicas.
    """
    state: PartialState = args.distributed_state
    AcceleratorState._reset_state(reset_partial_state=False)
    state.distributed_type = DistributedType.NO
    state.num_processes = 1
    state.process_index = number
    if not _is_local(state):
        state.local_process_index = number


def _is_local(state: Any) -> bool:
    """Whether a launcher has set the local rank."""
    return state.backend is not None
