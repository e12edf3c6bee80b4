"""The trainer's own folders of checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path

__all__ = ["last_complete_checkpoint"]

_NAME = re.compile(r"checkpoint-\d+")  # as in the trainer itself
_STATE = "trainer_state.json"  # written after everything else


def last_complete_checkpoint(folder: str | Path) -> str:
    """Returns the last complete ``checkpoint-<step>`` in a trainer's output folder.

    Raises:
        ValueError: there is none.
    """
    found = [each for each in Path(folder).glob("checkpoint-*") if _NAME.fullmatch(each.name)]
    for checkpoint in sorted(found, key=_step, reverse=True):
        if _is_complete(checkpoint):
            return str(checkpoint)
    raise ValueError(
        f"there is no complete checkpoint in {folder} to resume from: no folder checkpoint-<step> "
        f"has a {_STATE}; train without resume_from_checkpoint, or give the path of one"
    )


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_complete(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / _STATE).read_text()))
    except (OSError, ValueError):
        return False
