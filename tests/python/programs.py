"""Runs Python in processes of its own, and shows what they wrote when they fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

TORCHRUN = ("-m", "torch.distributed.run")


def run(*arguments: object, launcher: tuple[str, ...] = ()) -> str:
    """Run Python with the arguments; return what it wrote."""
    (output,) = run_together([(*launcher, *arguments)])
    return output


def run_together(commands: Sequence[Sequence[object]]) -> list[str]:
    """Run Python several times at once; return what each run wrote."""
    started = [
        subprocess.Popen(
            [sys.executable, *(str(argument) for argument in command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=150)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs
