"""Finds the binary of a plan, or builds it: once, however many processes ask."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dualpipe_ext._build import toolchain
from dualpipe_ext._build.cache import Cache, default_cache
from dualpipe_ext._build.ninja_file import LIBRARY, ninja_text, stage
from dualpipe_ext._build.plan import BuildPlan
from dualpipe_ext._build.progress import Progress
from dualpipe_ext._build.runner import run_ninja

WAIT_NOTICE_S, WAIT_INTERVAL_S = 2.0, 30.0


def ensure_built(plan: BuildPlan, *, force: bool = False) -> Path:
    """Returns the library of ``plan``, compiled now if the cache has none that fits.

    Processes that start together compile once: one builds under a file lock, the others wait for
    it. ``force`` compiles every file again.

    Raises:
        BuildError: it cannot be built; says why and what to do.
    """
    cache = default_cache()
    found = None if force else cache.find(plan)
    if found is not None:
        return found
    toolchain.require_compiler()
    with _locked(cache.lock_file(plan)):
        found = None if force else cache.find(plan)
        return found or _build(plan, cache, force=force)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock; while another process holds it for long, says so from time to time."""
    lock, progress, patience = FileLock(path), Progress(), WAIT_NOTICE_S
    while not lock.is_locked:
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            progress.line(
                f"waiting for another process that compiles the C++ core "
                f"({progress.elapsed_s:.0f} s)"
            )
            patience = WAIT_INTERVAL_S
    try:
        yield
    finally:
        lock.release()


def _build(plan: BuildPlan, cache: Cache, *, force: bool) -> Path:
    work, progress = cache.work_dir(plan), Progress()
    if force:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    compiler = toolchain.require_compiler()
    num_files = len(plan.sources.compiled(cuda=plan.cuda_home is not None))
    progress.line(
        f"compiling the C++ core for torch {plan.facts['torch']}; this happens once "
        f"({num_files} files, two to five minutes on two cores)"
    )
    stage(plan, work)
    (work / "build.ninja").write_text(ninja_text(plan, compiler.command))
    run_ninja(work, progress)
    library = cache.publish(plan, work / LIBRARY, _record(plan, progress.elapsed_s))
    if not plan.sources.is_checkout:
        shutil.rmtree(work, ignore_errors=True)
    progress.line(f"compiled in {progress.elapsed_s:.0f} s into {library.parent}")
    return library


def _record(plan: BuildPlan, seconds: float) -> dict[str, object]:
    compiler = toolchain.require_compiler()
    return {
        **plan.facts,
        "key": plan.key,
        "compiler": f"{compiler.command} ({compiler.version})",
        "built_at": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "build_seconds": round(seconds, 1),
    }
