"""What hangs is ended, and its stacks are shown: as a command, and as a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timeout_with_stacks
from inner_tests import make_tests_folder

TOOL = Path(__file__).resolve().parents[2] / ".ci" / "timeout_with_stacks.py"

HANG = """\
import subprocess, sys, time

def parent_waits():
    child = "import time\\ndef child_waits():\\n    time.sleep(600)\\nchild_waits()"
    subprocess.run([sys.executable, "-c", child])
"""


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parent)}
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        check=False,
        text=True,
        cwd=cwd,
        env=environment,
    )


def test_a_command_in_time_keeps_its_exit_code(tmp_path: Path) -> None:
    result = run(str(TOOL), "60", sys.executable, "-c", "raise SystemExit(3)", cwd=tmp_path)
    assert result.returncode == 3
    assert "TIMEOUT" not in result.stderr


def test_a_command_that_hangs_shows_the_stacks_of_its_tree(tmp_path: Path) -> None:
    (tmp_path / "hang.py").write_text(HANG + "\nparent_waits()\n")
    result = run(str(TOOL), "1", sys.executable, "hang.py", cwd=tmp_path)
    assert result.returncode == timeout_with_stacks.EXIT_TIMEOUT
    assert "hang.py is over its limit of 1 s" in result.stderr
    assert "parent_waits" in result.stderr
    assert "child_waits" in result.stderr


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_test_that_hangs_shows_the_stacks_of_its_tree(tmp_path: Path, num_workers: int) -> None:
    tests = make_tests_folder(tmp_path)
    body = "import pytest\n\n@pytest.mark.timeout(1)\ndef test_hangs():\n    parent_waits()\n"
    (tests / "test_hang.py").write_text(HANG + body)
    options = ("-p", "no:cacheprovider", "-n", str(num_workers))
    result = run("-m", "pytest", *options, str(tests), cwd=tmp_path)
    if num_workers:  # of pytest-xdist, which goes on after the end of one
        assert result.returncode == 1 and "crashed while running" in result.stdout
    else:
        assert result.returncode < 0
    assert "test_hangs took more than 1 s" in result.stderr
    assert "parent_waits" in result.stderr
    assert "child_waits" in result.stderr
