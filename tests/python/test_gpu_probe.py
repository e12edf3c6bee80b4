"""What is asked of a GPU: answers come one by one, and one that does not come is an answer."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from multiprocessing import Pipe
from pathlib import Path

import gpu_probe
import pytest
import torch
from probe_waits import Caller

ROOT = Path(__file__).resolve().parents[2]
SENT = [("started", "what comes first"), ("case", "a"), ("answer", "yes"), ("case", "b")]


def test_all_answers() -> None:
    ours, theirs = Pipe()
    for message in [*SENT, ("answer", "no"), ("end", "")]:
        theirs.send(message)
    assert list(gpu_probe._read(ours, 5.0, 5.0)) == [("a", "yes"), ("b", "no")]


def test_what_does_not_answer_blocks() -> None:
    ours, theirs = Pipe()
    for message in SENT:
        theirs.send(message)
    assert list(gpu_probe._read(ours, 5.0, 0.05)) == [
        ("a", "yes"),
        ("b", "blocks: the process was ended"),
    ]


def test_a_process_that_dies() -> None:
    ours, theirs = Pipe()
    theirs.close()
    found = list(gpu_probe._read(ours, 5.0, 5.0))
    assert found == [("the start of CUDA", "unknown: the process has died")]


def test_a_call_that_blocks_and_one_that_fails() -> None:
    go_on = threading.Event()
    caller = Caller(go_on.wait)
    assert caller.answer() == "blocks"
    go_on.set()
    caller.end()
    assert caller.answer().startswith("returns after ")
    assert (
        Caller(lambda: torch.ones(2) @ torch.ones(3)).answer().startswith("unknown: inconsistent")
    )


def asked(path: Path, only: str) -> dict[str, str]:
    """The answers to some questions, by case."""
    command = [sys.executable, "benchmarks/gpu_probe.py", "--only", only, "--json", str(path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return {found["case"]: found["answer"] for found in json.loads(path.read_text())}


@pytest.mark.gpu
def test_a_device_answers(tmp_path: Path) -> None:
    found = asked(tmp_path / "queues.json", "hardware queues")
    assert len(found) == 3 and all("31 of priority" in each for each in found.values()), found
    found = asked(tmp_path / "calls.json", r"Tensor\.cpu")
    assert len(found) == 4, found
    assert all(each.startswith("it blocks; the other returns") for each in found.values()), found
