"""Puts what benchmarks/gpu_check.sh has found into one JSON and one Markdown file."""

import json
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import torch

from dualpipe_ext import _C


def outcomes(results: Path) -> list[dict[str, str]]:
    """Name, outcome and seconds of each test in a JUnit file."""
    found = []
    for case in ElementTree.parse(results).iter("testcase"):
        problems = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcome = problems[0] if problems else "passed"
        name, seconds = case.get("name", ""), case.get("time", "")
        found.append({"test": name, "outcome": outcome, "seconds": seconds})
    return found


def machine() -> dict[str, str]:
    """What it ran on."""
    return {
        "device": torch.cuda.get_device_name(0),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "nccl": str(_C.nccl_version()),  # type: ignore[attr-defined] # in builds with CUDA alone
        "date": time.strftime("%Y-%m-%d"),
    }


def main(out: Path) -> None:
    """Write ``gpu_check.json`` and ``gpu_check.md`` into ``out``."""
    facts, tests = machine(), outcomes(out / "tests.xml")
    report = {"machine": facts, "tests": tests}
    (out / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n")
    title = ", ".join(f"{name} {value}" for name, value in facts.items())
    rows = [f"| {t['test']} | {t['outcome']} | {t['seconds']} |" for t in tests]
    table = "\n".join(["| test | outcome | seconds |", "|---|---|---|", *rows])
    (out / "gpu_check.md").write_text(f"{title}\n\n{table}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
