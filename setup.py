"""Carries the C++ sources in the package, and compiles them at install where torch is present.

Everything else about the package is in pyproject.toml. In an isolated build there is no torch: the
sources alone are installed, and compiled at the first import. With ``--no-build-isolation`` the
torch that is there is used, unless DUALPIPE_EXT_PREBUILD=0.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCE_DIRS = ("csrc", "python")
SOURCE_PATTERNS = ("*.cpp", "*.h")
BUILD_TOOLS = ("ninja", "filelock", "platformdirs")


def wants_prebuild() -> bool:
    """DUALPIPE_EXT_PREBUILD: 1 (an error without torch), 0, or by whether torch is there."""
    option = os.environ.get("DUALPIPE_EXT_PREBUILD", "auto")
    has_torch = importlib.util.find_spec("torch") is not None
    if option not in ("auto", "0", "1"):
        raise SystemExit(f"DUALPIPE_EXT_PREBUILD is {option!r}; it must be one of auto, 0, 1.")
    if option == "1" and not has_torch:
        raise SystemExit(
            "DUALPIPE_EXT_PREBUILD=1 asks to compile at install, and this build sees no torch. "
            "Install torch first, then: pip install --no-build-isolation ."
        )
    return has_torch and option != "0"


class BuildWithSources(build_py):
    """Adds the C++ sources, and the compiled extension where it is wanted."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # uses the sources of the checkout and the cache
            return
        package = Path(self.build_lib) / "dualpipe_ext"
        self._copy_sources(package / "_src")
        for stale in package.glob("_C.*[!i]"):  # all but _C.pyi
            stale.unlink()
        if wants_prebuild():
            self._prebuild(package)

    def _copy_sources(self, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        for path in find_sources():
            (target / path.parent).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, target / path)

    def _prebuild(self, package: Path) -> None:
        """Runs the package's own builder; tools that are missing are fetched for it alone."""
        # Asked of another process: in this one setuptools shows its own copies of some.
        check = [sys.executable, "-c", f"import {', '.join(BUILD_TOOLS)}"]
        with tempfile.TemporaryDirectory() as tools:
            if subprocess.run(check, capture_output=True, check=False).returncode != 0:
                pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", tools]
                subprocess.run([*pip, *BUILD_TOOLS], check=True)
            path = os.pathsep.join([str(ROOT), tools])
            command = [sys.executable, "-m", "dualpipe_ext._build.prebuild", str(package.resolve())]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})


class PlatformDistribution(Distribution):
    """A wheel with a compiled extension fits one platform, one with sources alone fits any."""

    def has_ext_modules(self) -> bool:
        """Whether the extension is compiled into the wheel."""
        return wants_prebuild()


def find_sources() -> list[Path]:
    """All C++ sources, relative to the root."""
    return [
        path.relative_to(ROOT)
        for folder in SOURCE_DIRS
        for pattern in SOURCE_PATTERNS
        for path in sorted((ROOT / folder).rglob(pattern))
    ]


setup(cmdclass={"build_py": BuildWithSources}, distclass=PlatformDistribution)
