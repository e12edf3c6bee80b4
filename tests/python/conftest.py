"""A time limit for every test, which shows the stacks of every process when a test hangs."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import pytest
import torch

from dualpipe_ext import testing

WATCHER = Path(__file__).resolve().parents[2] / ".ci" / "timeout_with_stacks.py"


# What takes seconds to import, in each of the processes that tests run ranks in.
SLOW_IMPORTS = (
    "torch",
    "dualpipe_ext",
    "torch.distributed.checkpoint",
    "transformers.trainer",
    "lightning.pytorch",
)


class TimeoutSettings(Protocol):
    """What pytest-timeout found out for a test: the marker's limit, or the configured one."""

    timeout: float | None


class Watcher:
    """A process that ends this one's tree when a test is over its limit."""

    def __init__(self, stderr: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WATCHER), "--watch", str(os.getpid())],
            stdin=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )

    def send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()

    def close(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


_watcher = pytest.StashKey[Watcher]()


def pytest_configure(config: pytest.Config) -> None:
    # Output is not captured here yet: this descriptor reaches the terminal even within a test.
    stderr = os.dup(2)
    config.stash[_watcher] = Watcher(stderr)
    os.close(stderr)


def pytest_collection_finish() -> None:
    """Ranks that are processes are forked from one that has imported what the collected tests have."""
    testing.START_METHOD = "forkserver"
    multiprocessing.set_forkserver_preload([name for name in SLOW_IMPORTS if name in sys.modules])


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_watcher].close()


# Takes the place of pytest-timeout's own timers, which see this one process alone.
@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: TimeoutSettings) -> bool:
    if settings.timeout:
        limit = f"{settings.timeout:g}"
        item.config.stash[_watcher].send(f"start {limit} {item.nodeid} took more than {limit} s")
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> bool:
    item.config.stash[_watcher].send("stop")
    return True


@pytest.fixture
def build_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty build cache of the test's own."""
    monkeypatch.setenv("DUALPIPE_EXT_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The tensors are tiny and the ranks many: torch's own threads would wait for one another."""
    torch.set_num_threads(1)
