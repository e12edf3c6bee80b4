"""The examples as users start them: commands in processes of their own, at tiny sizes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "examples" / "train_gpt.py"
SIZES = [
    "--layers",
    "4",
    "--width",
    "32",
    "--heads",
    "2",
    "--context",
    "16",
    "--rows",
    "2",
    "--warmup",
    "2",
    "--sample-bytes",
    "8",
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of text to learn from; some of its files are held out by the hash of their name."""
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(80):
        lines = (f"value_{i} = compute({i % 7}, {index % 5})\n" for i in range(120))
        (folder / f"{index}.py").write_text("".join(lines))
    return folder


def run(*arguments: object, launcher: tuple[str, ...] = (), ok: bool = True) -> str:
    """Run Python with the arguments; return what it wrote."""
    command = [sys.executable, *launcher, *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) is ok, output
    return output


def losses(log: Path) -> dict[int, list[float]]:
    """The micro-batch losses of each step in a log."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return {record["step"]: record["losses"] for record in records}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_gpt_learns_as_the_unsplit_model_does(tmp_path: Path, data: Path) -> None:
    log, checkpoint = tmp_path / "log.jsonl", tmp_path / "gpt.pt"
    output = run(
        *(TRAIN, *SIZES, "--data", data, "--log", log, "--checkpoint", checkpoint),
        *("--steps", 30, "--evaluate-every", 10, "--reference"),
    )
    curve = losses(log)
    assert sorted(curve) == list(range(1, 31))
    assert mean(curve[1]) == pytest.approx(5.5, abs=0.15)
    assert mean(curve[30]) < 3.5
    held_out = [float(value) for value in re.findall(r"held-out loss ([\d.]+)", output)]
    assert len(held_out) == 4 and held_out[-1] < 3.5 < held_out[0]
    assert "a sample:" in output and checkpoint.is_file()
    assert "first step bit-equal" in output
    difference = re.search(r"unsplit model over 30 steps: (\S+) nats", output)
    assert difference is not None and float(difference[1]) < 1e-4


@pytest.fixture
def interrupted(tmp_path: Path, data: Path) -> list[object]:
    """The arguments of a run of 8 steps of which 4 were made, and its log."""
    arguments: list[object] = [TRAIN, *SIZES, "--data", data, "--steps", 8]
    arguments += ["--checkpoint", tmp_path / "gpt.pt"]
    run(*arguments, "--log", tmp_path / "part.jsonl", "--stop-after", 4)
    return arguments


def test_resumed_losses_are_those_of_an_uninterrupted_run(
    tmp_path: Path, interrupted: list[object]
) -> None:
    run(*interrupted, "--log", tmp_path / "part.jsonl", "--resume")
    run(*interrupted, "--log", tmp_path / "whole.jsonl", "--checkpoint", tmp_path / "other.pt")
    whole = losses(tmp_path / "whole.jsonl")
    assert sorted(whole) == list(range(1, 9))
    assert losses(tmp_path / "part.jsonl") == whole


def test_resumes_on_other_ranks_under_another_schedule(
    tmp_path: Path, interrupted: list[object]
) -> None:
    logs = [tmp_path / "here.jsonl", tmp_path / "there.jsonl"]
    shape = ["--ranks", 2, "--schedule", "1f1b", "--stop-after", 5]
    (tmp_path / "copy.pt").write_bytes((tmp_path / "gpt.pt").read_bytes())
    run(*interrupted, "--log", logs[0], "--resume", "--stop-after", 5)
    run(*interrupted, "--log", logs[1], "--resume", "--checkpoint", tmp_path / "copy.pt", *shape)
    assert list(losses(logs[0])) == [5]
    assert losses(logs[0]) == losses(logs[1])


@pytest.mark.parametrize("schedule", ["dualpipev", "zb1p", "zbv"])
def test_gpt_trains_under_torchrun(tmp_path: Path, data: Path, schedule: str) -> None:
    log = tmp_path / "log.jsonl"
    run(
        *(TRAIN, *SIZES, "--data", data, "--log", log, "--checkpoint", tmp_path / "gpt.pt"),
        *("--steps", 4, "--schedule", schedule),
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    )
    curve = losses(log)
    assert mean(curve[4]) < mean(curve[1])


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--schedule", "dualpip"], "dualpipe"),
        (["--ranks", "3"], "even"),
        (["--microbatches", "6"], "8"),
        (["--layers", "3"], "--layers 4 or more"),
        (["--width", "33"], "--heads"),
        (["--resume", "--checkpoint", "nowhere.pt"], "without --resume"),
    ],
)
def test_impossible_options_say_what_to_change(arguments: list[str], remedy: str) -> None:
    output = run(TRAIN, *arguments, ok=False)
    assert "Traceback" not in output
    assert remedy in " ".join(output.split())


def test_resuming_another_shape_is_an_error(interrupted: list[object]) -> None:
    output = run(*interrupted, "--resume", "--width", 64, ok=False)
    assert "holds a model with width=32, not 64" in output
    assert "give --width 32, or start without --resume" in output


def test_own_model_learns() -> None:
    output = run(ROOT / "examples" / "own_model.py")
    curve = [float(value) for value in re.findall(r"loss ([\d.]+)", output)]
    assert len(curve) == 5 and curve[-1] < 0.5 * curve[0]
