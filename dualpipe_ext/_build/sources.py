"""Where the C++ sources are, which of them are compiled, and their digest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dualpipe_ext._build.errors import BuildError

SOURCE_DIRS = ("csrc", "python")
"""Folders of the source tree, both in a checkout and in an installed package."""

COMPILED_SUFFIXES = (".cpp",)
HEADER_SUFFIXES = (".h",)
CUDA_PREFIX = "cuda_"


@dataclass(frozen=True)
class SourceTree:
    """The C++ sources under ``root``, read once.

    If ``is_checkout``, a developer may edit them, so their object files are kept.
    """

    root: Path
    is_checkout: bool = False

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Contents by path relative to ``root``, with forward slashes, sorted by path."""
        suffixes = COMPILED_SUFFIXES + HEADER_SUFFIXES
        paths = [
            path
            for folder in SOURCE_DIRS
            for path in (self.root / folder).rglob("*")
            if path.suffix in suffixes and path.is_file()
        ]
        return {path.relative_to(self.root).as_posix(): path.read_bytes() for path in sorted(paths)}

    @cached_property
    def digest(self) -> str:
        """A digest of all paths and contents."""
        result = hashlib.sha256()
        for name, content in self.files.items():
            result.update(f"{name}\0{len(content)}\0".encode())
            result.update(content)
        return result.hexdigest()[:16]

    def compiled(self, *, cuda: bool) -> list[str]:
        """Returns the files to compile, the slowest first; CUDA files only if requested."""
        names = [name for name in self.files if name.endswith(COMPILED_SUFFIXES)]
        if not cuda:
            names = [name for name in names if not is_cuda_file(name)]
        return sorted(names, key=lambda name: (-self._weight(name), name))

    @property
    def has_cuda(self) -> bool:
        """Whether there is anything to compile for CUDA."""
        return any(is_cuda_file(name) for name in self.files)

    def _weight(self, name: str) -> int:
        """Estimates how slowly a file compiles: torch's headers, then pybind11's, then its size."""
        if name.startswith("csrc/torch/"):
            heavy = 2
        else:
            heavy = int(name.startswith("python/"))
        return heavy * 10_000_000 + len(self.files[name])


def is_cuda_file(name: str) -> bool:
    """Whether a source belongs only to builds with CUDA."""
    return name.rsplit("/", 1)[-1].removeprefix("bind_").startswith(CUDA_PREFIX)


def find_sources() -> SourceTree:
    """Finds the sources of this package: installed with it, or in its checkout."""
    package = Path(__file__).resolve().parent.parent
    for root, is_checkout in ((package / "_src", False), (package.parent, True)):
        if (root / "csrc").is_dir() and (root / "python").is_dir():
            return SourceTree(root, is_checkout)
    raise BuildError(
        f"The C++ sources of dualpipe_ext are missing: neither {package / '_src'} nor "
        f"{package.parent} holds csrc/ and python/. Install the package again: "
        "pip install --force-reinstall --no-deps dualpipe_ext"
    )
