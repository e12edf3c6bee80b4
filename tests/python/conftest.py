"""A time limit for every test, which shows the stacks of every process when a test hangs.

Imports nothing that takes seconds: that is left to the tests, for the processes of pytest that run none
or others.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import pytest

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
    """Tests of several workers of pytest-xdist run side by side, but for those that measure."""

    def __init__(self, folder: str) -> None:
        self._queue = os.open(Path(folder, "queue"), os.O_RDWR | os.O_CREAT)
        self._machine = os.open(Path(folder, "machine"), os.O_RDWR | os.O_CREAT)
        self._is_alone = False

    @contextmanager
    def taken(self, *, alone: bool, next_alone: bool) -> Iterator[None]:
        """A turn. Tests alone that follow one another share one: others wait for all of them once."""
        if not self._is_alone:
            # The queue keeps others from starting before the one who waits for all to end.
            fcntl.flock(self._queue, fcntl.LOCK_EX)
            fcntl.flock(self._machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            fcntl.flock(self._queue, fcntl.LOCK_UN)
        try:
            yield
        finally:
            self._is_alone = alone and next_alone
            if not self._is_alone:
                fcntl.flock(self._machine, fcntl.LOCK_UN)


def measures(item: pytest.Item | None) -> bool:
    return item is not None and item.get_closest_marker("measures") is not None


_watcher = pytest.StashKey[Watcher]()
_turns_folder = pytest.StashKey["tempfile.TemporaryDirectory[str]"]()
_turns = pytest.StashKey[Turns]()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:  # pytest-xdist, before it starts a worker
    if _turns_folder not in node.config.stash:
        folder = node.config.stash[_turns_folder] = tempfile.TemporaryDirectory()
        node.config.add_cleanup(folder.cleanup)
    node.workerinput["turns"] = node.config.stash[_turns_folder].name


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files stay whole, for what their tests share, and start in their order.

    xdist's own order, by the number of their tests, has those of few and long ones last.
    """
    from xdist.scheduler import LoadFileScheduling

    if config.option.dist != "load":  # asked for
        return None
    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "maxworkerrestart", 0) is None:
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
    if "dualpipe_ext" not in sys.modules:
        return
    from dualpipe_ext._launch import processes

    processes.START_METHOD = "forkserver"
    multiprocessing.set_forkserver_preload([name for name in SLOW_IMPORTS if name in sys.modules])


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_watcher].close()


# Outside of everything else of a test: nobody's time limit or fixture counts the waiting.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    turns = item.config.stash.get(_turns, None)
    if turns is None:
        return (yield)
    watcher = item.config.stash[_watcher]
    watcher.send(f"start 900 {item.nodeid} waited more than 900 s for its turn")
    with turns.taken(alone=measures(item), next_alone=measures(nextitem)):
        watcher.send("stop")
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
    """The tensors are tiny and the ranks many: torch's own threads would wait for one another.

    So would those of processes that tests start or fork.
    """
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # as torchrun sets it
