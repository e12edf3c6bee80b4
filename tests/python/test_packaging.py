"""The wheel and the sdist, built from a copy of the checkout, work from an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import dualpipe_ext
from dualpipe_ext._build.plan import PREBUILT_NAME, PREBUILT_RECORD_NAME
from dualpipe_ext._build.sources import SourceTree

CHECKOUT = Path(__file__).resolve().parents[2]
PACKED = ("csrc", "python", "dualpipe_ext")
PACKED_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")
PIP_WHEEL = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")


def run(*arguments: str, cwd: Path, **environment: str) -> str:
    """What Python prints; an error holds what it says."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def build_wheel(source: Path, target: Path, prebuild: str = "0") -> Path:
    run(
        *PIP_WHEEL,
        "-w",
        str(target),
        str(source),
        cwd=source.parent,
        DUALPIPE_EXT_PREBUILD=prebuild,
    )
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: building leaves files behind."""
    root = tmp_path_factory.mktemp("checkout")
    junk = shutil.ignore_patterns("__pycache__", "*.so", "_src")
    for name in PACKED:
        shutil.copytree(CHECKOUT / name, root / name, ignore=junk)
    for name in PACKED_FILES:
        shutil.copyfile(CHECKOUT / name, root / name)
    return root


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def compiled_wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the extension, compiled for the torch that is present."""
    return build_wheel(checkout, tmp_path_factory.mktemp("compiled"), prebuild="1")


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("sdist")
    script = f"from setuptools import build_meta; build_meta.build_sdist({str(target)!r})"
    run("-c", script, cwd=checkout)
    (path,) = target.glob("*.tar.gz")
    return path


def install(wheel: Path, folder: Path) -> dict[str, str]:
    """Installs into ``folder`` and imports from there; where things were found."""
    site = folder / "site"
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site))
    run(*pip, str(wheel), cwd=folder)
    script = (
        "import json, dualpipe_ext; from dualpipe_ext import _C;"
        "print(json.dumps({'package': dualpipe_ext.__file__, 'extension': _C.__file__}))"
    )
    found: dict[str, str] = json.loads(run("-c", script, cwd=folder, PYTHONPATH=str(site)))
    assert Path(found["package"]) == site / "dualpipe_ext" / "__init__.py"
    return found


def test_a_wheel_works_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    assert wheel.name.endswith("py3-none-any.whl")
    install(wheel, tmp_path)
    package = tmp_path / "site" / "dualpipe_ext"
    assert SourceTree(package / "_src").digest == SourceTree(CHECKOUT).digest
    assert (package / "py.typed").is_file()
    assert (package / "_C.pyi").is_file()


def test_an_sdist_gives_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        # Python's first releases of 3.10 and 3.11 have no filters.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
        archive.extractall(tmp_path)
    (source,) = tmp_path.iterdir()
    again = build_wheel(source, tmp_path / "wheel")
    assert contents(again) == contents(wheel)


def contents(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as archive:
        return {
            entry.filename: entry.CRC for entry in archive.infolist() if "RECORD" not in str(entry)
        }


def test_with_torch_present_the_extension_is_compiled_at_install(
    compiled_wheel: Path, tmp_path: Path
) -> None:
    assert not compiled_wheel.name.endswith("any.whl")
    found = install(compiled_wheel, tmp_path)
    package = tmp_path / "site" / "dualpipe_ext"
    assert Path(found["extension"]) == package / PREBUILT_NAME


def test_a_compiled_extension_for_another_torch_is_left_alone(
    compiled_wheel: Path, tmp_path: Path
) -> None:
    install(compiled_wheel, tmp_path)
    record = tmp_path / "site" / "dualpipe_ext" / PREBUILT_RECORD_NAME
    record.write_text(json.dumps({**json.loads(record.read_text()), "key": "another"}))
    script = "from dualpipe_ext import _C; print(_C.__file__)"
    library = run("-c", script, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert Path(library.strip()).name == "_C.so"


def test_to_compile_without_torch_is_an_error(checkout: Path, tmp_path: Path) -> None:
    script = (
        "import importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a);"
        "from setuptools import build_meta; build_meta.build_wheel('.')"
    )
    environment = {**os.environ, "DUALPIPE_EXT_PREBUILD": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "Install torch first" in result.stderr


def test_the_import_leaves_out_what_few_programs_need() -> None:
    """Each takes a tenth of the import's time, or more."""
    script = (
        "import sys, dualpipe_ext\n"
        "print([name for name in ('rich', 'torch.distributed.checkpoint') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "[]\n"


def test_the_command_line_tells_what_was_built(tmp_path: Path) -> None:
    package = str(Path(dualpipe_ext.__file__).resolve().parents[1])
    command = ("-m", "dualpipe_ext")
    library = run(*command, "build", cwd=tmp_path, PYTHONPATH=package).strip()
    info = json.loads(run(*command, "info", "--json", cwd=tmp_path, PYTHONPATH=package))
    assert info["extension"] == library
    assert info["version"] == dualpipe_ext.__version__
    table = run(*command, "info", cwd=tmp_path, PYTHONPATH=package)
    assert library in table
    assert info["torch"] in table


def test_a_bad_option_on_the_command_line_is_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "dualpipe_ext", "info"],
        env={**os.environ, "DUALPIPE_EXT_CUDA": "maybe"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: DUALPIPE_EXT_CUDA is 'maybe'")
    assert "Traceback" not in result.stderr
