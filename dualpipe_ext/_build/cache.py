"""The folder that keeps binaries between runs.

``built/<key>-<compiler>/`` holds ``_C.so`` and ``build.json``; ``work/<toolchain>/`` holds copies
of the sources and the object files; ``locks/`` holds one lock per toolchain. An entry's library
appears by a rename, as its last file, so an entry is either complete or absent.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from dualpipe_ext._build.errors import BuildError
from dualpipe_ext._build.plan import BuildPlan

LIBRARY_NAME = "_C.so"
RECORD_NAME = "build.json"
MAX_ENTRIES = 16


@dataclass(frozen=True)
class Cache:
    """The cache under ``root``."""

    root: Path

    def entry(self, plan: BuildPlan) -> Path:
        """Returns the folder of the binary that this plan's compiler makes."""
        return self.root / "built" / f"{plan.key}-{plan.compiler_key}"

    def find(self, plan: BuildPlan) -> Path | None:
        """Returns a library that fits, or ``None``; without a compiler here, one made by any."""
        pattern = f"{plan.key}-*" if plan.compiler_key == "any" else self.entry(plan).name
        found = (self.root / "built").glob(f"{pattern}/{LIBRARY_NAME}")
        return next(iter(sorted(found)), None)

    def work_dir(self, plan: BuildPlan) -> Path:
        """Returns the folder of sources and object files."""
        return self.root / "work" / plan.work_key

    def lock_file(self, plan: BuildPlan) -> Path:
        """Returns the lock file that a builder holds, after creating its folder.

        Raises:
            BuildError: the cache cannot be written.
        """
        path = self.root / "locks" / f"{plan.work_key}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BuildError(
                f"The build cache {self.root} cannot be written ({error.strerror}). Set "
                "DUALPIPE_EXT_CACHE to a folder that can."
            ) from error
        return path

    def publish(self, plan: BuildPlan, library: Path, record: dict[str, object]) -> Path:
        """Makes a finished library the entry of its plan, and drops the oldest entries."""
        entry = self.entry(plan)
        entry.mkdir(parents=True, exist_ok=True)
        install(library, entry, record, LIBRARY_NAME, RECORD_NAME)
        self._drop_oldest(keep=entry)
        return entry / LIBRARY_NAME

    def _drop_oldest(self, keep: Path) -> None:
        others = [path for path in (self.root / "built").iterdir() if path != keep]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in others[MAX_ENTRIES - 1 :]:
            shutil.rmtree(path, ignore_errors=True)


def default_cache() -> Cache:
    """Returns the cache in ``DUALPIPE_EXT_CACHE``, or in the user's cache folder."""
    chosen = os.environ.get("DUALPIPE_EXT_CACHE")
    return Cache(Path(chosen or _users_cache()).absolute())


def _users_cache() -> str:
    import platformdirs  # here: whoever names a folder may do without it

    return platformdirs.user_cache_dir("dualpipe_ext")


def install(
    library: Path, folder: Path, record: dict[str, object], name: str, record_name: str
) -> None:
    """Copies a library and its record into ``folder``; the library appears last, by a rename."""
    text = json.dumps(record, indent=2) + "\n"
    for target, data in ((record_name, text.encode()), (name, library.read_bytes())):
        temporary = folder / f".{target}.{os.getpid()}"
        temporary.write_bytes(data)
        os.replace(temporary, folder / target)
