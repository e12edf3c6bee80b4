"""Runs programs: in processes of their own as users do, or in this one, which has imported all."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from torch.distributed import run as torchrun

TORCHRUN = ("-m", "torch.distributed.run")


def run(*arguments: object, launcher: Sequence[object] = ()) -> str:
    """Run Python with the arguments; return what it wrote, and show it when that fails."""
    process = subprocess.run(
        [sys.executable, *(str(argument) for argument in (*launcher, *arguments))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
        check=False,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


def run_here(script: Path, *arguments: object) -> None:
    """Run a script as the main one of this process; its ranks are forked from what has imported all.

    What is not tested so is that the script imports all that it uses.
    """
    argv = [str(script), *(str(argument) for argument in arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(sys, "path", [str(script.parent), *sys.path]),
        mock.patch.dict(os.environ),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("default")  # a user's
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            assert not end.code


def torchrun_here(*commands: Sequence[object]) -> str:
    """Launch scripts as torchrun does, all at once, but fork the ranks; return what these wrote."""
    with TemporaryDirectory() as folder, mock.patch.dict(os.environ):
        options = f"--run-path --start-method forkserver --redirects 3 --log-dir {folder}".split()
        # In the main thread torchrun would handle signals.
        with ThreadPoolExecutor() as threads:
            for launched in [threads.submit(_launch, *options, *command) for command in commands]:
                launched.result()
        return "".join(file.read_text() for file in sorted(Path(folder).rglob("stdout.log")))


def _launch(*arguments: object) -> None:
    torchrun.run(torchrun.parse_args([str(argument) for argument in arguments]))
