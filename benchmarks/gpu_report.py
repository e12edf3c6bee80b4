"""Collects what benchmarks/gpu_check.sh has found in one JSON and one Markdown file.

Both are written anew after each step, from files only, so that results survive what comes next.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Facts = dict[str, str]
Report = dict[str, Any]
PROBED = ("question", "case", "answer")  # of gpu_probe.py
IDENTITY = ("commit", "device", "torch", "cuda")  # what is checked, and on what
ROOT = Path(__file__).resolve().parents[1]


def outcomes(folder: Path) -> list[Facts]:
    """Returns the name, outcome and message of each test, as gpu_outcomes.py wrote them."""
    found: dict[str, Facts] = {}
    for path in sorted(folder.glob("*.outcomes")):
        for line in path.read_text().splitlines():
            fact: Facts = json.loads(line)
            found[fact["test"]] = fact
    return list(found.values())


def one_line(text: str, most: int = 300) -> str:
    """Returns the text on one line, without what would break a table."""
    return " ".join(text.split()).replace("|", "/")[:most]


def steps_of(path: Path) -> list[Facts]:
    """Returns what each step was and how it ended; status 124 means its time limit."""
    names = ("step", "status", "seconds", "command")
    lines = path.read_text().splitlines() if path.exists() else []
    return [dict(zip(names, line.split("\t"), strict=True)) for line in lines]


def ending(step: Facts) -> str:
    """Returns in a few words how a step ended."""
    return {"0": "done", "124": "over its time limit", "137": "over its time limit"}.get(
        step["status"], f"ended with {step['status']}"
    )


def read_benchmarks(folder: Path) -> list[Report]:
    """Returns the reports of all benchmarks, each with its step, in the order they were written."""
    paths = sorted(folder.glob("bench_*.json"), key=lambda path: path.stat().st_mtime)
    return [{"step": path.stem, **json.loads(path.read_text())} for path in paths]


def read_json(path: Path, otherwise: Any) -> Any:
    """Returns the content of a file, or ``otherwise`` if there is no file."""
    return json.loads(path.read_text()) if path.exists() else otherwise


def merged(earlier: Report, now: Report) -> Report:
    """Merges two parts of a check; where both have something, the later part holds.

    Numbers of other code or of another machine are left out.
    """
    machine = now["machine"]
    same = all(machine.get(k) == earlier["machine"].get(k) for k in IDENTITY)
    if machine and not same:
        return now
    keys = {"benchmarks": "step", "tests": "test", "steps": "step"}
    both = {
        name: list({fact[key]: fact for fact in earlier[name] + now[name]}.values())
        for name, key in keys.items()
    }
    return {
        "machine": earlier["machine"] | machine,
        "probe": now["probe"] or earlier["probe"],
        **both,
    }


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def goal_rows(benchmarks: Sequence[Report]) -> list[list[str]]:
    """Returns rows of every number beside what it must reach."""
    words = {True: "yes", False: "**no**", None: ""}
    return [
        [
            benchmark["benchmark"],
            one_line(row["name"]),
            row["goal"],
            "-" if row["measured"] is None else f"{row['measured']:.4g}",
            words[row["passed"]],
            one_line(row["note"]),
        ]
        for benchmark in benchmarks
        for row in benchmark["rows"]
    ]


def markdown(report: Report) -> str:
    """Returns the report as tables that can be pasted into docs/performance.md."""
    tests = report["tests"]
    bad = [t for t in tests if t["outcome"] != "passed"]
    facts = [[name, one_line(value)] for name, value in report["machine"].items()]
    probed = [[one_line(fact[key]) for key in PROBED] for fact in report["probe"]]
    parts = [
        table(["", ""], facts),
        table(PROBED, probed),
        table(
            ["benchmark", "what", "must reach", "measured", "reached", "note"],
            goal_rows(report["benchmarks"]),
        ),
        f"Tests on the device: {len(tests) - len(bad)} of {len(tests)} passed.",
    ]
    if bad:
        rows = [[one_line(t["test"]), t["outcome"], one_line(t["message"])] for t in bad]
        parts.append(table(["test", "outcome", "message"], rows))
    steps = [[s["step"], ending(s), s["seconds"], f"`{s['command']}`"] for s in report["steps"]]
    parts.append(table(["step", "outcome", "seconds", "command"], steps))
    return "\n\n".join(parts) + "\n"


def output_of(*command: str) -> str:
    """Returns what a command prints; "unknown" if it fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return one_line(done.stdout) if done.returncode == 0 else "unknown"


def machine(device: str, processes: str, sanitizer: str) -> Facts:
    """Returns what the check runs on; the only part that needs torch."""
    import torch
    from places import place_of

    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        **(place_of(device).machine() if device == "cpu" else _gpu()),
        "driver": output_of(*driver),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        "commit": os.environ.get("GPU_CHECK_COMMIT")
        or output_of("git", "describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d"),
        "command": "bash benchmarks/gpu_check.sh",
        **({"processes on one GPU share it by": processes} if processes else {}),
        "compute-sanitizer": sanitizer,
    }


def _gpu() -> Facts:
    import torch

    from dualpipe_ext import _C

    nccl = getattr(_C, "nccl_version", lambda: "not built")()
    return {
        "device": torch.cuda.get_device_name(),
        "cuda": str(torch.version.cuda),
        "nccl": str(nccl),
    }


def check_nccl() -> str | None:
    """Returns why ranks on one GPU cannot communicate over this process's NCCL, or ``None``."""
    from dualpipe_ext import _C

    found = getattr(_C, "nccl_version", lambda: "0.0 (not built)")()
    try:
        getattr(_C, "require_one_nccl", lambda: None)()
    except ValueError as error:
        return f"{error}; nothing is run over NCCL"
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) >= (2, 30):
        return None
    return (
        f"NCCL {found} refuses several ranks on one GPU, which 2.30 allows: give a newer one by "
        f"NCCL_LIBRARY; nothing is run over NCCL"
    )


def write(work: Path, out: Path) -> None:
    """Writes ``gpu_check.json`` and ``gpu_check.md`` to ``out``, from the files in ``work``.

    What an earlier part of the check wrote to ``out`` is in ``work`` as ``earlier.json``.
    """
    report = {
        "machine": read_json(work / "machine.json", {}),
        "probe": read_json(work / "probe.json", []),
        "benchmarks": read_benchmarks(work),
        "tests": outcomes(work),
        "steps": steps_of(work / "steps.tsv"),
    }
    earlier = read_json(work / "earlier.json", None)
    if earlier is not None:
        report = merged(earlier, report)
    (out / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "gpu_check.md").write_text(markdown(report))


if __name__ == "__main__":
    if sys.argv[1] == "machine":
        facts = machine(*sys.argv[2:5])
        Path(sys.argv[5]).write_text(json.dumps(facts))
        print(facts)
    elif sys.argv[1] == "nccl":
        sys.exit(check_nccl())
    else:
        write(Path(sys.argv[1]), Path(sys.argv[2]))
