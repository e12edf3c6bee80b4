"""The compiler, torch and CUDA that an extension is built with."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from dualpipe_ext._build.errors import BuildError

CudaOption = Literal["auto", "on", "off"]

COMPILE_FLAGS = ("-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-g0", "-DNDEBUG", "-pthread")
COMPILER_CANDIDATES = ("g++", "c++", "clang++")


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command, and the version that it reports."""

    command: str
    version: str


@cache
def find_compiler() -> Compiler | None:
    """Finds the compiler named by ``CXX``, or the first one on the path; ``None`` if there is none.

    Raises:
        BuildError: ``CXX`` names no program that exists.
    """
    chosen = os.environ.get("CXX")
    for candidate in [chosen] if chosen else COMPILER_CANDIDATES:
        path = shutil.which(candidate)
        if path is not None:
            text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
            return Compiler(path, text.stdout.partition("\n")[0].strip())
    if chosen:
        raise BuildError(
            f"CXX is {chosen!r}, and there is no such program. Set CXX to a C++20 compiler, or "
            "unset it to use the first of " + ", ".join(COMPILER_CANDIDATES) + "."
        )
    return None


def require_compiler() -> Compiler:
    """Returns the compiler; if there is none, raises ``BuildError`` with the remedy."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(
            "dualpipe_ext compiles its C++ core once for the installed torch, and found no C++ "
            f"compiler: none of {', '.join(COMPILER_CANDIDATES)} is on the path. Install one "
            "(Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; conda: conda "
            "install -c conda-forge cxx-compiler) or set CXX to its path. Version 11 of GCC, or "
            "13 of Clang, is the oldest that works."
        )
    return compiler


def find_cuda_home() -> Path | None:
    """Finds the folder of CUDA's headers and runtime, if there is one.

    That is ``CUDA_HOME`` or ``CUDA_PATH``, if set. Otherwise it is what pip installed with torch,
    which fits it best; then the toolkit of the nvcc on the path; then /usr/local/cuda.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    candidates = [Path(named)] if named else _site_folders("nvidia/cu[0-9]*")
    if not named:
        candidates += [Path(nvcc).resolve().parent.parent] if nvcc else []
        candidates.append(Path("/usr/local/cuda"))
    return next((home for home in candidates if _is_cuda_home(home)), None)


def _is_cuda_home(home: Path) -> bool:
    """Whether all headers are there: pip installs them from several packages."""
    include = home / "include"
    return (
        (include / "cuda_runtime_api.h").is_file()  # nvidia-cuda-runtime
        and (include / "crt/host_config.h").is_file()  # nvidia-cuda-crt
        and any((folder / "nv/target").exists() for folder in _header_folders(home))  # -cccl
    )


def _header_folders(cuda_home: Path) -> list[Path]:
    return [cuda_home / "include", cuda_home / "include/cccl"]


def resolve_cuda(option: CudaOption, *, has_sources: bool) -> Path | None:
    """Returns the toolkit to build with, or ``None`` for a build without CUDA.

    Raises:
        BuildError: CUDA was requested and is not possible.
    """
    if option == "off":
        return None
    home = find_cuda_home()
    missing = []
    if torch_cuda_version() is None:
        missing.append(f"torch {torch.__version__} is a build without CUDA")
    if home is None:
        missing.append("no CUDA toolkit was found (CUDA_HOME, nvcc, /usr/local/cuda)")
    if not has_sources:
        missing.append("this version of dualpipe_ext has no CUDA sources")
    if missing and option == "on":
        raise BuildError(
            f"CUDA was asked for (DUALPIPE_EXT_CUDA=1 or --cuda) and is not possible: "
            f"{'; '.join(missing)}. Mend that, or build without CUDA (DUALPIPE_EXT_CUDA=0)."
        )
    return None if missing else home


def torch_cuda_version() -> str | None:
    """Returns the CUDA version that torch was built with; ``None`` if it was built without."""
    return torch.version.cuda


def torch_root() -> Path:
    """Returns the folder of the installed torch."""
    return Path(torch.__file__).resolve().parent


def torch_facts() -> dict[str, str]:
    """Returns all that a binary depends on at run time besides its sources and flags."""
    return {
        "torch": str(torch.__version__),
        "torch_revision": str(torch.version.git_version),
        "torch_cuda": str(torch_cuda_version()),
        "cxx11_abi": str(int(torch.compiled_with_cxx11_abi())),
        "python": str(sysconfig.get_config_var("SOABI")),
        "machine": platform.machine(),
    }


def compile_flags(cuda_home: Path | None = None) -> list[str]:
    """Returns the flags of every file. ``-iquote``: <torch/...> must never find our csrc/torch."""
    root, python_include = torch_root(), Path(sysconfig.get_path("include"))
    _require(root / "include" / "ATen" / "ATen.h", "reinstall torch: its C++ headers are missing")
    _require(
        python_include / "Python.h", "install them (Debian, Ubuntu: apt-get install python3-dev)"
    )
    includes = (
        root / "include",
        root / "include" / "torch" / "csrc" / "api" / "include",
        python_include,
    )
    return [
        *COMPILE_FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        "-DTORCH_EXTENSION_NAME=_C",
        "-DTORCH_API_INCLUDE_EXTENSION_H",
        *(f"-iquote{folder}" for folder in ("csrc", "python")),
        *(f"-isystem{folder}" for folder in (*includes, *_cuda_includes(cuda_home))),
    ]


def link_flags(cuda_home: Path | None = None) -> list[str]:
    """Returns the flags of the linker."""
    lib = torch_root() / "lib"
    libraries = ["torch", "torch_cpu", "torch_python", "c10"]
    if cuda_home is not None:
        libraries += ["torch_cuda", "c10_cuda"]
    return [
        "-shared",
        "-pthread",
        f"-L{lib}",
        *(f"-l{name}" for name in libraries),
        *_cuda_libraries(cuda_home),
        f"-Wl,-rpath,{lib}",
    ]


def find_nccl() -> Path | None:
    """Finds the folder whose ``include`` and ``lib`` hold NCCL: torch's own, then the system's."""
    homes = [*_site_folders("nvidia/nccl"), Path("/usr/local"), Path("/usr")]
    return next((home for home in homes if (home / "include/nccl.h").is_file()), None)


def _cuda_includes(cuda_home: Path | None) -> list[Path]:
    if cuda_home is None:
        return []
    nccl = find_nccl()
    if nccl is None:
        raise BuildError(
            "NCCL's header is missing: there is no nccl.h beside torch (nvidia/nccl/include), in "
            "/usr/local/include or /usr/include. Install it (pip install nvidia-nccl-cu"
            f"{str(torch_cuda_version()).partition('.')[0]}; Debian, Ubuntu: apt-get install "
            "libnccl-dev), or build without CUDA (DUALPIPE_EXT_CUDA=0)."
        )
    return [*_header_folders(cuda_home), nccl / "include"]


def _cuda_libraries(cuda_home: Path | None) -> list[str]:
    """Returns paths of the libraries that torch loads, so that a process has only one of each."""
    if cuda_home is None:
        return []
    nccl = find_nccl() or Path("/usr")
    return [
        _library(cuda_home, "libcudart.so*"),
        _library(nccl, "libnccl.so*"),
    ]


def _library(home: Path, pattern: str) -> str:
    folders = ("lib", "lib64", f"lib/{platform.machine()}-linux-gnu")
    found = [path for folder in folders for path in sorted((home / folder).glob(pattern))]
    if not found:
        raise BuildError(
            f"There is no {pattern} under {home}; install CUDA's libraries there, choose another "
            "toolkit with CUDA_HOME, or build without CUDA (DUALPIPE_EXT_CUDA=0)."
        )
    return str(found[0])


def _site_folders(name: str) -> list[Path]:
    """Returns folders that NVIDIA's pip packages may have created beside torch's."""
    return [path for path in torch_root().parent.glob(name) if path.is_dir()]


def _require(header: Path, remedy: str) -> None:
    if not header.is_file():
        raise BuildError(f"C++ headers are missing: there is no {header}; {remedy}.")
