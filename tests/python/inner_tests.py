"""Tests that a test runs, under the conftest of this project's own."""

from __future__ import annotations

import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent


def make_tests_folder(root: Path) -> Path:
    """A folder for tests below one that is made to look like this project's."""
    shutil.copytree(HERE.parents[1] / ".ci", root / ".ci")
    tests = root / "tests" / "python"
    tests.mkdir(parents=True)
    shutil.copyfile(HERE / "conftest.py", tests / "conftest.py")
    return tests
