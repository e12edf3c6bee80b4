"""A pytest plugin that writes each outcome at once, so that a killed run leaves what it had.

It writes lines of JSON to the file that GPU_CHECK_OUTCOMES names; the last line of a test holds.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def note(test: str, outcome: str, message: str = "") -> None:
    """Writes one line about a test."""
    line = json.dumps({"test": test, "outcome": outcome, "message": message})
    with Path(os.environ["GPU_CHECK_OUTCOMES"]).open("a") as file:
        file.write(line + "\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Notes all tests that are to run: a session that exceeds its time limit leaves some out."""
    for item in session.items:
        note(item.nodeid, "did not run")


def pytest_runtest_logstart(nodeid: str) -> None:
    """Notes a test that begins."""
    note(nodeid, "did not end")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes how a test ended."""
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        note(report.nodeid, report.outcome, getattr(crash, "message", ""))
