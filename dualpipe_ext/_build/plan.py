"""What to build and under which key: everything that decides whether a binary fits."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from dualpipe_ext._build import toolchain
from dualpipe_ext._build.errors import BuildError
from dualpipe_ext._build.sources import SourceTree, find_sources
from dualpipe_ext._build.toolchain import COMPILE_FLAGS, CudaOption

PREBUILT_NAME = "_C" + EXTENSION_SUFFIXES[0]
PREBUILT_RECORD_NAME = "_C.json"
"""The extension compiled at install time, in the package's folder, and what it was built with."""

CUDA_VALUES: dict[str, CudaOption] = {"": "auto", "auto": "auto", "1": "on", "0": "off"}


@dataclass(frozen=True)
class BuildPlan:
    """One binary: these sources, this torch, this CUDA. The compiler only matters for building."""

    sources: SourceTree
    cuda_home: Path | None = None

    @cached_property
    def facts(self) -> dict[str, str]:
        """What a binary must match to be loaded here."""
        return {
            **toolchain.torch_facts(),
            "cuda": "off" if self.cuda_home is None else str(self.cuda_home),
            "flags": " ".join(COMPILE_FLAGS),
            "sources": self.sources.digest,
        }

    @property
    def key(self) -> str:
        """Identifies every binary that fits, whatever compiler made it."""
        return _digest(self.facts)

    @property
    def compiler_key(self) -> str:
        """Identifies the compiler, in addition to :attr:`key`; ``any`` if there is none."""
        compiler = toolchain.find_compiler()
        return "any" if compiler is None else _digest({"compiler": compiler.version})

    @property
    def work_key(self) -> str:
        """Identifies the object files by all but the sources, which are compared one by one."""
        facts = {name: fact for name, fact in self.facts.items() if name != "sources"}
        compiler = toolchain.require_compiler()
        return _digest({**facts, "compiler": compiler.command + compiler.version})


def cuda_option() -> CudaOption:
    """Returns what ``DUALPIPE_EXT_CUDA`` says: ``auto`` (the default), ``1`` or ``0``."""
    value = os.environ.get("DUALPIPE_EXT_CUDA", "")
    if value not in CUDA_VALUES:
        raise BuildError(f"DUALPIPE_EXT_CUDA is {value!r}; it must be one of auto, 1, 0.")
    return CUDA_VALUES[value]


def make_plan(cuda: CudaOption | None = None, sources: SourceTree | None = None) -> BuildPlan:
    """Returns the plan for this process, from the package's sources and the environment."""
    sources = sources or find_sources()
    option = cuda_option() if cuda is None else cuda
    return BuildPlan(sources, toolchain.resolve_cuda(option, has_sources=sources.has_cuda))


def find_prebuilt(plan: BuildPlan) -> Path | None:
    """Returns the library that was compiled at install time, if it still fits."""
    package = Path(__file__).resolve().parent.parent
    library, record = package / PREBUILT_NAME, package / PREBUILT_RECORD_NAME
    if library.is_file() and record.is_file() and json.loads(record.read_text())["key"] == plan.key:
        return library
    return None


def _digest(facts: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
