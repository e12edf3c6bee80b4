"""A time limit for every test, which shows the stacks of every process when a test hangs."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

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


class Turns:
    """Tests of other workers of pytest-xdist run beside this one's, but not beside those that measure."""

    def __init__(self, folder: str) -> None:
        self._queue, self._machine = (os.open(Path(folder, name), os.O_CREAT) for name in "qm")

    @contextmanager
    def taken(self, *, alone: bool) -> Iterator[None]:
        # The queue keeps others from starting again and again before the one who waits for all to end.
        fcntl.flock(self._queue, fcntl.LOCK_EX)
        fcntl.flock(self._machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(self._queue, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self._machine, fcntl.LOCK_UN)


_watcher = pytest.StashKey[Watcher]()
_turns_folder = pytest.StashKey["tempfile.TemporaryDirectory[str]"]()
_turns = pytest.StashKey[Turns]()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:  # pytest-xdist, before it starts a worker
    if _turns_folder not in node.config.stash:
        node.config.stash[_turns_folder] = tempfile.TemporaryDirectory()
    node.workerinput["turns"] = node.config.stash[_turns_folder].name


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Files stay whole, for what their tests share, and start in their order: the longest not last."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        config.option.loadscopereorder = False
        config.option.maxworkerrestart = 0  # a new worker would hang in the same test
    folder = getattr(config, "workerinput", {}).get("turns")
    if folder is not None:
        config.stash[_turns] = Turns(folder)
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


# Outside of everything else of a test: nobody's time limit or fixture counts the waiting.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    alone = item.get_closest_marker("measures") is not None
    turns = item.config.stash.get(_turns, None)
    turn: AbstractContextManager[None] = turns.taken(alone=alone) if turns else nullcontext()
    with turn:
        return (yield)


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
