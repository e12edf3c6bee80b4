"""Under pytest-xdist, no other test runs beside one that measures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from inner_tests import make_tests_folder

TESTS = """
import os, time
from pathlib import Path
import pytest

@pytest.mark.{mark}
@pytest.mark.parametrize("number", range(5))
def test_{mark}(number):
    start = time.monotonic()
    time.sleep(0.3)
    with Path(os.environ["TIMES"]).open("a") as times:
        times.write(f"{mark} {{start}} {{time.monotonic()}}\\n")
"""

# Both workers begin with their tests at one time.
TOGETHER = """
import os, time
from pathlib import Path

def pytest_runtestloop(session):
    if hasattr(session.config, "workerinput"):
        folder = Path(os.environ["TIMES"]).parent
        (folder / f"ready {os.getpid()}").touch()
        while len(list(folder.glob("ready *"))) < 2:
            time.sleep(0.01)
"""

SETTINGS = """
[pytest]
markers =
    measures
    others
"""


def intervals(folder: Path) -> list[tuple[str, float, float]]:
    """(mark, start, end) of the tests of two files, run by two workers."""
    tests = make_tests_folder(folder)
    (folder / "pytest.ini").write_text(SETTINGS)
    (folder / "conftest.py").write_text(TOGETHER)
    for mark in ("measures", "others"):
        (tests / f"test_{mark}.py").write_text(TESTS.format(mark=mark))
    times = folder / "times"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "2", str(tests)],
        check=True,
        cwd=folder,
        env={**os.environ, "TIMES": str(times)},
    )
    lines = (line.split() for line in times.read_text().splitlines())
    return [(mark, float(start), float(end)) for mark, start, end in lines]


def test_what_measures_runs_alone(tmp_path: Path) -> None:
    """In one go, so that others wait once."""
    found = intervals(tmp_path)
    measured = [(start, end) for mark, start, end in found if mark == "measures"]
    others = [(start, end) for mark, start, end in found if mark == "others"]
    assert len(measured) == len(others) == 5
    first, last = min(start for start, _ in measured), max(end for _, end in measured)
    assert not any(begin < last and first < finish for begin, finish in others)
