"""Ends a command, or a test, that hangs, and shows where every process of it stood.

``timeout_with_stacks.py SECONDS COMMAND...`` runs a command under a limit and exits with its code,
or with 124 after the limit. ``timeout_with_stacks.py --watch PID`` is what the tests' conftest
starts: it reads ``start SECONDS NAME`` and ``stop`` lines, and ends PID's tree when a test is over
its limit. A process of its own can do so even while the interpreter lock is never given back.

C stacks come from gdb, Python stacks from py-spy, each where it is installed; Linux only.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

TOOL_LIMIT_S = 60
EXIT_TIMEOUT = 124


def process_tree(root: int) -> list[int]:
    """``root`` and all its living descendants, parents first."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    tree, queue = [], [root]
    while queue:
        tree.append(queue.pop(0))
        queue += children.get(tree[-1], [])
    return tree


def print_stacks(pid: int) -> None:
    """The C and the Python stack of each thread of one process, on stderr."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        _print(f"\n===== process {pid}: {command[:200]}")
    py_spy = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{_path()}")
    if py_spy is not None:
        _run_tool([py_spy, "dump", "--pid", str(pid)])
    gdb = shutil.which("gdb")
    if gdb is not None:
        quiet = ["-nx", "-batch", "-iex", "set auto-load no", "-iex", "set debuginfod enabled off"]
        _run_tool([gdb, *quiet, "-ex", "thread apply all bt 20", "-p", str(pid)])
    if gdb is None and py_spy is None:
        _print("(neither gdb nor py-spy is installed: no stacks)")


def end_tree(root: int, reason: str) -> None:
    """Prints the stacks of ``root``'s whole tree, then kills it; this process is left out."""
    _print(f"\n===== TIMEOUT: {reason}; the stacks of every process follow")
    tree = [pid for pid in process_tree(root) if pid != os.getpid()]
    for pid in tree:
        print_stacks(pid)
    for pid in tree:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def run_with_limit(limit_s: float, command: list[str]) -> int:
    """The command's exit code, or ``EXIT_TIMEOUT``."""
    process = subprocess.Popen(command)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        end_tree(process.pid, f"{' '.join(command)} is over its limit of {limit_s:g} s")
        process.wait()
        return EXIT_TIMEOUT


def watch(pid: int) -> None:
    """Serves one test process until it closes its end of the pipe."""
    deadline, name, pending = None, "", b""
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        while True:
            wait_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not selector.select(wait_s):
                end_tree(pid, name)
                return
            data = os.read(sys.stdin.fileno(), 4096)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                verb, _, rest = line.decode().partition(" ")
                seconds, _, name = rest.partition(" ")
                deadline = time.monotonic() + float(seconds) if verb == "start" else None


def _run_tool(command: list[str]) -> None:
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=TOOL_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        _print(f"({command[0]} did not answer within {TOOL_LIMIT_S} s)")
        return
    _print(result.stdout if result.stdout.strip() else result.stderr)


def _path() -> str:
    return os.environ.get("PATH", os.defpath)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """The command line."""
    if len(arguments) == 2 and arguments[0] == "--watch":
        watch(int(arguments[1]))
        return 0
    if len(arguments) < 2:
        _print(__doc__)
        return 2
    return run_with_limit(float(arguments[0]), arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
