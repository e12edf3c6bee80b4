"""The examples at tiny sizes: each kind as users start it, the others without the wait for imports."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import typer
from ports import free_port
from programs import TORCHRUN, run, run_here, torchrun_here
from typer.testing import CliRunner

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
TWO_RANKS = ("--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text to learn from; some of its files are held out by the hash of their name."""
    folder = tmp_path_factory.mktemp("text")
    for index in range(80):
        lines = (f"value_{i} = compute({i % 7}, {index % 5})\n" for i in range(200))
        (folder / f"{index}.py").write_text("".join(lines))
    return folder


def read_losses(path: Path) -> dict[int, list[float]]:
    """The micro-batch losses of each step."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["step"]: record["losses"] for record in records}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_gpt_learns_as_the_unsplit_model_does(tmp_path: Path, data: Path) -> None:
    losses, checkpoint = tmp_path / "losses.jsonl", tmp_path / "gpt.pt"
    output = run(
        *(TRAIN, *SIZES, "--data", data, "--losses", losses, "--checkpoint", checkpoint),
        *("--steps", 30, "--evaluate-every", 10, "--reference"),
    )
    curve = read_losses(losses)
    assert sorted(curve) == list(range(1, 31))
    assert mean(curve[1]) == pytest.approx(5.5, abs=0.15)
    assert mean(curve[30]) < 3.5
    held_out = [float(value) for value in re.findall(r"held-out loss ([\d.]+)", output)]
    assert len(held_out) == 4 and held_out[-1] < 3.5 < held_out[0]
    assert "a sample:" in output and checkpoint.is_file()
    # The first step must give the same bits. From then on gradients are summed in another order
    # (per copy of a stage, then over both), and what that rounds differently, training amplifies.
    assert "first step bit-equal" in output
    difference = re.search(r"unsplit model over 30 steps: (\S+) nats", output)
    assert difference is not None and float(difference[1]) < 2e-5


class Run:
    """A run of 8 steps on two ranks, kept below a folder."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.checkpoint, self.losses = folder / "gpt.pt", folder / "losses.jsonl"
        self.arguments = [
            *(*SIZES, "--data", data, "--steps", 8, "--ranks", 2),
            *("--checkpoint", self.checkpoint, "--losses", self.losses),
        ]

    def start(self, *options: object) -> dict[int, list[float]]:
        run_here(TRAIN, *self.arguments, *options)
        return read_losses(self.losses)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[int, list[float]]:
    """The losses of the run when nothing interrupts it."""
    return Run(tmp_path_factory.mktemp("whole"), data).start()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A folder with the first 4 steps of the run."""
    folder = tmp_path_factory.mktemp("interrupted")
    assert sorted(Run(folder, data).start("--stop-after", 4)) == [1, 2, 3, 4]
    return folder


@pytest.fixture
def half(tmp_path: Path, interrupted: Path, data: Path) -> Run:
    """A copy of the first 4 steps of the run, to go on from."""
    for file in interrupted.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return Run(tmp_path, data)


def test_resumed_losses_are_those_of_an_uninterrupted_run(
    half: Run, whole: dict[int, list[float]]
) -> None:
    assert half.start("--resume") == whole


def test_resumes_under_another_schedule(half: Run, whole: dict[int, list[float]]) -> None:
    resumed = half.start("--resume", "--schedule", "1f1b", "--stop-after", 5)
    assert resumed == {step: whole[step] for step in range(1, 6)}


def test_gpt_trains_under_torchrun(tmp_path: Path, data: Path) -> None:
    losses = tmp_path / "losses.jsonl"
    run(
        *(TRAIN, *SIZES, "--data", data, "--losses", losses, "--checkpoint", tmp_path / "gpt.pt"),
        *("--steps", 4, "--schedule", "dualpipev"),
        launcher=(*TORCHRUN, *TWO_RANKS),
    )
    curve = read_losses(losses)
    assert mean(curve[4]) < mean(curve[1])


def test_two_nodes_learn_what_two_processes_of_one_do(
    tmp_path: Path, data: Path, whole: dict[int, list[float]]
) -> None:
    """Two launchers that know each other by an address alone, here that of this machine."""
    address = ("--master-addr", "127.0.0.1", "--master-port", free_port())
    launchers = [
        ("--nnodes", 2, "--node-rank", node, "--nproc-per-node", 1, *address) for node in (0, 1)
    ]
    job = Run(tmp_path, data)
    torchrun_here(*((*launcher, TRAIN, *job.arguments) for launcher in launchers))
    assert read_losses(job.losses) == whole


def command_of(script: Path) -> typer.Typer:
    """The command of an example in this process."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    command = typer.Typer()
    command.command()(module.main)
    return command


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    return command_of(TRAIN)


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--schedule", "dualpip"], "dualpipe"),
        (["--ranks", "3"], "even"),
        (["--microbatches", "6"], "use 8"),
        (["--layers", "3"], "--layers 4 or more"),
        (["--width", "33"], "multiple of --heads 4: choose a width such as 36"),
        (["--resume", "--checkpoint", "nowhere.pt"], "start without --resume"),
        (["--resume", "--reference"], "leave out --resume"),
    ],
)
def test_impossible_options_say_what_to_change(
    app: typer.Typer, arguments: list[str], remedy: str
) -> None:
    assert remedy in refusal(app, arguments)


def test_resuming_another_shape_is_an_error(app: typer.Typer, interrupted: Path) -> None:
    checkpoint = str(interrupted / "gpt.pt")
    text = refusal(app, [*SIZES, "--checkpoint", checkpoint, "--resume", "--width", "64"])
    assert "holds a model with width=32, not 64" in text
    assert "give --width 32, or start without --resume" in text


def refusal(app: typer.Typer, arguments: list[str]) -> str:
    """What the command says when it refuses its options, on one line."""
    result = CliRunner().invoke(app, arguments, env={"TERMINAL_WIDTH": "200", "NO_COLOR": "1"})
    assert result.exit_code == 2
    return " ".join(re.sub(r"[^\x20-\x7e]", " ", result.output).split())


@pytest.mark.parametrize("name", ["own_model.py", "sharded_stages.py"])
def test_an_own_model_learns(capfd: pytest.CaptureFixture[str], name: str) -> None:
    run_here(ROOT / "examples" / name)
    curve = [float(value) for value in re.findall(r"loss ([\d.]+)", capfd.readouterr().out)]
    assert len(curve) == 5 and curve[-1] < 0.5 * curve[0]


def test_a_cut_model_is_put_together_again(capfd: pytest.CaptureFixture[str]) -> None:
    run_here(ROOT / "examples" / "cut_model.py")
    output = capfd.readouterr().out
    found = re.search(r"loss ([\d.]+) in the pipeline, ([\d.]+) in one piece", output)
    assert found is not None, output
    assert float(found[1]) < 0.5  # from 3.5, the variance of the labels
    assert float(found[2]) == pytest.approx(float(found[1]), abs=2e-5)


def read_curve(output: str) -> list[float]:
    """The losses that were printed, all of which are those of the run in one piece."""
    difference = re.search(r"largest difference of a step's loss: (\S+) of it", output)
    assert difference is not None and float(difference[1]) < 1e-5, output
    return [float(value) for value in re.findall(r"^ *\d+   ([\d.]+) ", output, re.MULTILINE)]


def test_a_transformer_learns_as_in_one_piece(
    data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_here(
        *(ROOT / "examples" / "transformer_example.py", "--num-gpus", 2, "--data", data),
        *("--steps", 12, "--width", 16, "--rows", 9),
    )
    curve = read_curve(capfd.readouterr().out)
    assert len(curve) == 3 and curve[-1] < curve[0] - 0.3


def test_a_trainer_of_hugging_face_learns_as_unsplit(
    data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    example = ROOT / "examples" / "hf_trainer_example.py"
    assert "--num-gpus" in run(example, "--help"), "what it needs is imported"
    size = ("--steps", 12, "--width", 16, "--rows", 8, "--data", data)
    run_here(example, "--num-gpus", 2, *size)
    curve = read_curve(capfd.readouterr().out)
    assert len(curve) == 3 and curve[-1] < curve[0] - 0.1
    launched = torchrun_here((*TWO_RANKS, example, *size))
    logged = [float(value) for value in re.findall(r"'loss': '?([\d.]+)", launched)]
    assert len(logged) == 12, "the first rank logs, and no other one"
    assert logged[-1] == pytest.approx(curve[-1], rel=1e-3)  # four digits are printed


def test_a_trainer_of_lightning_learns_as_unsplit(capfd: pytest.CaptureFixture[str]) -> None:
    example = ROOT / "examples" / "lightning_example.py"
    size = ("--num-gpus", 2, "--steps", 25, "--width", 16, "--layers", 2)
    run_here(example, *size)
    beside = capfd.readouterr().out
    launched = torchrun_here((*TWO_RANKS, example, *size))
    curve = read_curve(beside)
    assert len(curve) == 4 and curve[-1] < curve[0] - 0.3
    held_out = re.search(r"held out: ([\d.]+) over the pipeline, ([\d.]+) in one", beside)
    assert held_out is not None
    assert float(held_out[1]) == pytest.approx(float(held_out[2]), rel=1e-5)
    assert f"last loss: {curve[-1]:.6f}; held out: {held_out[1]}" in launched


@pytest.mark.parametrize("name", ["lightning_example.py", "transformer_example.py"])
def test_an_odd_number_of_ranks_says_what_to_change(name: str) -> None:
    text = refusal(command_of(ROOT / "examples" / name), ["--num-gpus", "3"])
    assert "must be even" in text


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--num-gpus", "4", "--layers", "2"], "use at most 2"),
        (["--rows", "3"], "use --rows 4"),
    ],
)
def test_an_impossible_transformer_says_what_to_change(arguments: list[str], remedy: str) -> None:
    assert remedy in refusal(command_of(ROOT / "examples" / "transformer_example.py"), arguments)
