"""A pytest plugin that writes down each outcome at once: a run that is ended leaves what it had.

One line of JSON a test, into the file that GPU_CHECK_OUTCOMES names; of a test's lines the last one
holds.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def note(test: str, outcome: str, message: str = "") -> None:
    """Write one line."""
    line = json.dumps({"test": test, "outcome": outcome, "message": message})
    with Path(os.environ["GPU_CHECK_OUTCOMES"]).open("a") as file:
        file.write(line + "\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note all that are to run: a session that is over its time limit leaves some out."""
    for item in session.items:
        note(item.nodeid, "did not run")


def pytest_runtest_logstart(nodeid: str) -> None:
    """Note a test that begins."""
    note(nodeid, "did not end")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note how it ended."""
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        note(report.nodeid, report.outcome, getattr(crash, "message", ""))
