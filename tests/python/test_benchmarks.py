"""The benchmarks for GPUs, tried out on the CPU, and the arithmetic behind their numbers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_gemm_slowdown
import bench_mirrors
import bench_overlap
import bench_p2p
import bench_step
import gpu_report
import pytest
import torch
from bench_activations import Peak, Sizes, predicted_bytes, worst
from bench_host_time import host_us_an_action
from bench_overlap import message_bytes
from common import Row, attempt, row_of
from places import Cpu, place_of, slope
from sleeping import ReusedResults, SleepStage, SleepTimes, free_loss
from thread_ranks import StartLine, in_threads, step_seconds, why_not_in_threads

ROOT = Path(__file__).resolve().parents[2]

TINY: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "p2p": (bench_p2p.main, {"mib": [0.25]}),
    "step": (bench_step.main, {"ranks": [2], "chunks": 4, "stage_ms": 1.0}),
    "overlap": (bench_overlap.main, {"ranks": [2], "chunks": 4, "stage_ms": 1.0}),
    "mirrors": (
        bench_mirrors.main,
        {"ranks": [2], "chunks": 4, "stage_ms": 1.0, "gradient_mib": 0.25},
    ),
    "gemm_slowdown": (bench_gemm_slowdown.main, {"size": 32, "products": 6}),
}


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_measures_something_on_the_cpu(name: str, tmp_path: Path) -> None:
    main, arguments = TINY[name]
    main(**arguments, repeats=1, device="cpu", json=tmp_path / "found.json")
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["benchmark"] == name and report["machine"]["device"].startswith("none")
    assert report["rows"] and all(row["measured"] is not None for row in report["rows"])


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="--device tpu: choose cuda, or cpu"):
        place_of("tpu")


@pytest.mark.parametrize(
    ("row", "passed", "goal"),
    [
        (Row("x", 0.9, at_least=0.9), True, ">= 0.9"),
        (Row("x", 0.89, at_least=0.9), False, ">= 0.9"),
        (Row("x", 1.05, at_most=1.04), False, "<= 1.04"),
        (Row("x", None, at_most=1.04), False, "<= 1.04"),
        (Row("x", 6.0, at_least=5, at_most=5), False, "5"),
        (Row("x", 6.0), None, "-"),
    ],
)
def test_rows_know_whether_they_pass(row: Row, passed: bool | None, goal: str) -> None:
    assert (row.passed, row.goal) == (passed, goal)


def test_what_cannot_be_measured_is_a_row_with_the_reason() -> None:
    def fail() -> float:
        raise ValueError("no such\ntransport")

    row = row_of("rate", attempt(fail), lambda rate: rate, at_least=1.0)
    assert row.note == "ValueError: no such transport" and row.passed is False
    assert row_of("rate", attempt(lambda: 2.0), lambda rate: rate / 2).measured == 1.0


def test_arithmetic() -> None:
    launch = 5e-6  # whatever each measurement adds
    assert slope([(c, c / 1.7e9 + launch) for c in (2e6, 10e6)]) == pytest.approx(1.7e9)
    assert message_bytes(1e12, 0.5e-3, 1e12) == round(5e8 / 1024) * 1024
    assert message_bytes(1e12, 0.5e-3, 1e6) == round(1e6 / 1024) * 1024
    assert message_bytes(1e3, 1e-3, 1e9) == 1024
    assert step_seconds([[(0.0, 2.0)], [(0.5, 3.0)]]) == [3.0]
    # 20 stages of 50 us and 10 losses of 10 us leave 500 of 1,600 us to 50 actions.
    assert host_us_an_action(1.6e-3, 20, 50, 50e-6, 10e-6) == pytest.approx(10.0)


def test_the_predicted_peak() -> None:
    found = predicted_bytes(4, Sizes(activation=1000, message=10), batch=7)
    assert found == 5 * 1010 + 8 * 10 + 7
    peaks = [Peak(5, 5, 103.0, 100.0), Peak(6, 5, 100.0, 100.0)]
    assert worst(peaks) == Peak(6, 5, 103.0, 100.0)


def test_memory_is_counted_as_long_as_it_is_held() -> None:
    place = Cpu()
    first = place.hold(100)
    second = place.hold(50)
    del first
    place.hold(20)
    assert place.peak_bytes() == 150
    del second
    place.reset_peak()
    assert place.peak_bytes() == 0


def test_light_stages_move_no_memory() -> None:
    """What a message costs a stage itself must not be taken for communication."""
    results = ReusedResults()
    stage = SleepStage(SleepTimes(0, 0, 0), results=results)
    x = torch.zeros(1, 100, requires_grad=True)
    y = stage(x)
    free_loss(y).backward()
    buffer = results.output(x).data_ptr()
    assert x.grad is not None
    assert y.data_ptr() == x.grad.data_ptr() == buffer


def test_a_rank_that_fails_does_not_leave_the_others_at_the_start_line() -> None:
    def measure(rank: int, num_ranks: int, start_line: StartLine) -> None:
        if rank == 1:
            raise LookupError("no memory left")
        start_line.wait()

    with pytest.raises(LookupError, match="no memory left"):
        in_threads(measure, 3)


def test_the_report_says_what_is_missing(tmp_path: Path) -> None:
    rows = [Row("rate | 1 MiB", 0.5, at_least=0.9, note="slow"), Row("other", None, at_most=1.0)]
    lines = [
        {"test": "a", "outcome": "did not end", "message": ""},
        {"test": "a", "outcome": "passed", "message": ""},
        {"test": "b", "outcome": "did not end", "message": ""},
    ]
    described = [row.__dict__ | {"goal": row.goal, "passed": row.passed} for row in rows]
    report = {"benchmark": "p2p", "rows": described}
    (tmp_path / "bench_p2p.json").write_text(json.dumps(report))
    (tmp_path / "x.outcomes").write_text("".join(json.dumps(line) + "\n" for line in lines))
    probed = [{"question": "queues", "case": "one waits", "answer": "blocks | ever"}]
    (tmp_path / "probe.json").write_text(json.dumps(probed))
    (tmp_path / "steps.tsv").write_text("build\t0\t61\tmake\nbench_p2p\t124\t60\tpython x\n")
    gpu_report.write(tmp_path, tmp_path)
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| p2p | rate / 1 MiB | >= 0.9 | 0.5 | **no** | slow |" in text
    assert "| p2p | other | <= 1 | - | **no** |  |" in text
    assert "| queues | one waits | blocks / ever |" in text
    assert "1 of 2 passed" in text and "| b | did not end |  |" in text
    assert "| bench_p2p | over its time limit | 60 | `python x` |" in text
    assert json.loads((tmp_path / "gpu_check.json").read_text())["steps"][0]["status"] == "0"


def part(commit: str, step: str, **more: Any) -> dict[str, Any]:
    """What one part of the check has found."""
    return {
        "machine": {"commit": commit, **more.pop("machine", {})},
        "probe": more.pop("probe", []),
        "benchmarks": [{"step": step, "rows": []}],
        "tests": [{"test": "a", "outcome": step}],
        "steps": [{"step": "build"}, {"step": step}],
    }


def test_two_parts_of_a_check_are_one_report() -> None:
    first = part("c", "bench_p2p", machine={"driver": "1"}, probe=[{"case": "x"}])
    found = gpu_report.merged(first, part("c", "bench_mirrors", machine={"shared": "by MPS"}))
    assert found["machine"] == {"commit": "c", "driver": "1", "shared": "by MPS"}
    assert found["probe"] == [{"case": "x"}]
    assert [each["step"] for each in found["benchmarks"]] == ["bench_p2p", "bench_mirrors"]
    assert found["tests"] == [{"test": "a", "outcome": "bench_mirrors"}]
    assert [each["step"] for each in found["steps"]] == ["build", "bench_p2p", "bench_mirrors"]


def test_numbers_of_other_code_are_left_out() -> None:
    now = part("d", "bench_mirrors")
    assert gpu_report.merged(part("c", "bench_p2p"), now) == now


def test_more_nccl_ranks_than_a_process_takes_are_not_measured() -> None:
    assert why_not_in_threads("copy", 8) is None and why_not_in_threads("nccl", 2) is None
    found = why_not_in_threads("nccl", 4)
    assert found is not None and found.startswith("not measured: over NCCL")


def test_outcomes_name_the_tests_that_had_no_time(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "def test_fine(): pass\ndef test_bad(): assert 1 == 2\ndef test_late(): pass\n"
    )
    file = tmp_path / "outcomes"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "gpu_outcomes", "test_x.py"]
    subprocess.run(
        command,
        cwd=tmp_path,
        env={
            **os.environ,
            "GPU_CHECK_OUTCOMES": str(file),
            "PYTHONPATH": str(ROOT / "benchmarks"),
        },
        capture_output=True,
        timeout=60,
        check=False,
    )
    found = {}
    for line in file.read_text().splitlines():
        entry = json.loads(line)
        found[entry["test"].partition("::")[2]] = entry["outcome"]
    assert found == {"test_fine": "passed", "test_bad": "failed", "test_late": "did not run"}


def test_the_check_goes_on_after_a_step_that_fails(tmp_path: Path) -> None:
    """With no time left for anything: every step is reported, and none has run."""
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_check.sh"), str(tmp_path)],
        env={
            **os.environ,
            "GPU_CHECK_DEVICE": "cpu",
            "GPU_CHECK_SECONDS": "0",
            "PYTHON": sys.executable,
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    text = (tmp_path / "gpu_check.md").read_text()
    steps = json.loads((tmp_path / "gpu_check.json").read_text())["steps"]
    assert len(steps) >= 10 and {step["status"] for step in steps} == {"124"}
    # The shell counts whole seconds, so a step of no time may go from one to the next.
    assert re.search(r"\| bench_p2p \| over its time limit \| [01] \|", text)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".log", ".md"]
