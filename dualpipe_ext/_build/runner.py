"""Runs ninja, shows its progress, and turns a failure into a readable error."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from dualpipe_ext._build.errors import BuildError
from dualpipe_ext._build.progress import Progress

_STATUS = re.compile(r"\[(\d+)/(\d+)\] (.*)")
_ERROR = re.compile(r"\b(fatal )?error\b|undefined reference|cannot find -l|Killed", re.IGNORECASE)
_CONTEXT_LINES = 12


def find_ninja() -> str:
    """Returns the ninja of its wheel, or else the one on the path."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        path = shutil.which("ninja")
        if path is None:
            raise BuildError("ninja is missing; pip install ninja") from None
        return path
    return str(Path(BIN_DIR) / "ninja")


def num_jobs() -> int:
    """Returns ``MAX_JOBS``, or the number of CPUs that this process may use."""
    chosen = os.environ.get("MAX_JOBS")
    if chosen is None:
        return len(os.sched_getaffinity(0))
    if not chosen.isdecimal() or int(chosen) < 1:
        raise BuildError(f"MAX_JOBS is {chosen!r}; it must be a whole number from 1.")
    return int(chosen)


def run_ninja(work: Path, progress: Progress) -> None:
    """Brings the targets of ``work/build.ninja`` up to date.

    Raises:
        BuildError: a compile or the link failed; holds the compiler's first error.
    """
    command = [find_ninja(), "-C", str(work), "-j", str(num_jobs())]
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] ", "LC_ALL": "C"}
    output: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            status = _STATUS.match(line)
            if status:
                progress.step(int(status[1]), int(status[2]), status[3])
            else:
                output.append(line.rstrip("\n"))
    progress.finish()
    if process.returncode != 0:
        log = work / "build.log"
        log.write_text("\n".join(output) + "\n")
        raise BuildError(_failure_text(output, log))


def _failure_text(output: list[str], log: Path) -> str:
    return (
        "The C++ core of dualpipe_ext did not compile. The first error:\n\n"
        + "\n".join(f"    {line}" for line in first_error(output))
        + f"\n\nAll output: {log}\n"
        "What to do: `python -m dualpipe_ext info` shows the compiler and the torch; another "
        "compiler is chosen with CXX (GCC 11 or newer), and MAX_JOBS=1 needs the least memory. Then "
        "build again: python -m dualpipe_ext build"
    )


def first_error(output: list[str]) -> list[str]:
    """Returns the first failed command's output from its first error on, without the command."""
    failures = [i for i, line in enumerate(output) if line.startswith("FAILED: ")]
    if failures:
        output = output[failures[0] + 2 : failures[1] if len(failures) > 1 else None]
    lines = [line for line in output if not line.startswith("ninja: ")]
    start = next((i for i, line in enumerate(lines) if _ERROR.search(line)), 0)
    return lines[start : start + _CONTEXT_LINES]
