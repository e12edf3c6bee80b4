"""The one dependency rule: a later folder of csrc may include an earlier one, never the reverse."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"

LAYERS = ("common", "schedule", "memory", "device", "comm", "engine", "torch")
TORCH_FREE = LAYERS[:-1]

TORCH = re.compile(r"^(torch|ATen|c10|caffe2)/")
PYTHON = re.compile(r"(^|/)(Python\.h|pybind)|python", re.IGNORECASE)
CUDA = re.compile(r"cuda|nccl\.h|cudnn|cublas", re.IGNORECASE)
CUDA_FILES = re.compile(r"(^|/)cuda_[^/]*$")
LOCAL_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
SYSTEM_INCLUDE = re.compile(r"^\s*#\s*include\s+<([^>]+)>", re.MULTILINE)
CONDITION = re.compile(r"^\s*#\s*(?:if|ifdef|ifndef|elif)\b.*$", re.MULTILINE)


def files_of(layer: str) -> list[Path]:
    return [path for path in sorted((CSRC / layer).rglob("*")) if path.is_file()]


def local_includes(path: Path) -> list[str]:
    return LOCAL_INCLUDE.findall(path.read_text())


def system_includes(path: Path) -> list[str]:
    return SYSTEM_INCLUDE.findall(path.read_text())


def test_every_folder_is_a_layer() -> None:
    assert sorted(path.name for path in CSRC.iterdir()) == sorted(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_holds_sources_alone(layer: str) -> None:
    assert files_of(layer)
    for path in files_of(layer):
        assert path.suffix in (".h", ".cpp"), path
        if path.suffix == ".h":
            assert path.read_text().startswith("#pragma once\n"), path


@pytest.mark.parametrize("layer", LAYERS)
def test_includes_earlier_layers_alone(layer: str) -> None:
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    for path in files_of(layer):
        for include in local_includes(path):
            assert include.split("/")[0] in allowed, f"{path}: {include}"
            assert (CSRC / include).is_file(), f"{path}: {include} is not in csrc/"


@pytest.mark.parametrize("layer", TORCH_FREE)
def test_builds_without_torch_and_python(layer: str) -> None:
    for path in files_of(layer):
        for include in system_includes(path):
            assert not TORCH.search(include), f"{path}: <{include}>"
            assert not PYTHON.search(include), f"{path}: <{include}>"


@pytest.mark.parametrize("layer", LAYERS)
def test_keeps_cuda_in_files_of_its_own(layer: str) -> None:
    for path in files_of(layer):
        if CUDA_FILES.search(path.relative_to(CSRC).as_posix()):
            continue
        for include in system_includes(path):
            assert not CUDA.search(include), f"{path}: <{include}>"
        for condition in CONDITION.findall(path.read_text()):
            assert not CUDA.search(condition), f"{path}: {condition}: use a file of its own"


def test_leaves_the_interpreter_to_the_bindings() -> None:
    for path in files_of("torch"):
        for include in system_includes(path):
            assert not PYTHON.search(include), f"{path}: <{include}>; it belongs in python/"


def test_the_bindings_hold_no_kernels() -> None:
    paths = sorted((ROOT / "python").glob("*"))
    assert paths
    for path in paths:
        for include in local_includes(path):
            own = (ROOT / "python" / include).is_file()
            assert own or include.split("/")[0] in LAYERS, f"{path}: {include}"
        for include in system_includes(path):
            assert not CUDA.search(include), f"{path}: <{include}>"


def test_every_cpp_test_mirrors_a_layer() -> None:
    tests = ROOT / "tests" / "cpp"
    folders = sorted(path.name for path in tests.iterdir() if path.is_dir())
    assert folders
    assert set(folders) <= set(LAYERS)


PACKAGE = ROOT / "dualpipe_ext"
# Each may import itself and what comes before it. Modules of the package itself come first.
PARTS = ("adapters", "checkpoint", "training", "compat")
# How a pipeline takes partitions, which adapters make.
OF_ADAPTERS = {"dualpipe_ext.adapters.partition", "dualpipe_ext.adapters.placing"}
FACADES = ("__init__.py", "__main__.py")


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("dualpipe_ext.")}


@pytest.mark.parametrize("part", ["", *PARTS])
def test_the_package_imports_earlier_parts_alone(part: str) -> None:
    later = PARTS[PARTS.index(part) + 1 :] if part else PARTS
    files = [*(PACKAGE / part).rglob("*.py")] if part else [*PACKAGE.glob("*.py")]
    assert files
    for path in (each for each in files if part or each.name not in FACADES):
        for name in imports_of(path) - (set() if part else OF_ADAPTERS):
            assert name.split(".")[1] not in later, f"{path}: {name}"
