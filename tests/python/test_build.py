"""The builder on a source tree of two tiny files, with the machine's own compiler."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dualpipe_ext import _native
from dualpipe_ext._build import BuildError, BuildPlan, ensure_built, make_plan, toolchain
from dualpipe_ext._build.cache import MAX_ENTRIES, default_cache
from dualpipe_ext._build.progress import Progress
from dualpipe_ext._build.sources import SourceTree

PACKAGE = Path(_native.__file__).resolve().parent


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """The compiler is looked for once in a process; tests change what there is to find."""
    toolchain.find_compiler.cache_clear()
    yield
    toolchain.find_compiler.cache_clear()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree without torch or Python: it compiles in a moment."""
    root = tmp_path / "tree"
    for name, text in {
        "csrc/one.h": "int one();\n",
        "csrc/one.cpp": '#include "one.h"\nint one() { return 1; }\n',
        "python/module.cpp": '#include "one.h"\nint two() { return 2 * one(); }\n',
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def compiler_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the compiler write down what it compiles and links."""
    log = tmp_path / "compiler.log"
    log.touch()
    real = toolchain.require_compiler().command
    write_compiler(tmp_path / "c++", f'echo "$@" >> {log}; exec {real} "$@"', monkeypatch)
    return log


def write_compiler(path: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && {{ echo "{path}"; exit; }}\n{body}\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    toolchain.find_compiler.cache_clear()


def build(tree: Path, *, is_checkout: bool = False) -> Path:
    return ensure_built(BuildPlan(SourceTree(tree, is_checkout)))


def start_build(tree: Path) -> subprocess.Popen[str]:
    """Builds in a process of its own, with a copy of the builder that finds this tree."""
    package = tree / "dualpipe_ext"
    if not package.exists():
        shutil.copytree(PACKAGE / "_build", package / "_build")
        (package / "__init__.py").touch()
    return subprocess.Popen(
        [sys.executable, "-m", "dualpipe_ext._build.prebuild", str(tree)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        stderr=subprocess.PIPE,
        text=True,
    )


def calls(log: Path, name: str) -> int:
    return sum(f"-c {name}" in line for line in log.read_text().splitlines())


def test_the_second_build_is_the_first(tree: Path, build_cache: Path, compiler_log: Path) -> None:
    first = build(tree)
    assert first.is_file()
    assert build_cache in first.parents
    assert build(tree) == first
    assert calls(compiler_log, "csrc/one.cpp") == 1
    assert calls(compiler_log, "python/module.cpp") == 1


def test_an_edit_compiles_only_what_it_changes(
    tree: Path, build_cache: Path, compiler_log: Path
) -> None:
    first = build(tree, is_checkout=True)
    (tree / "csrc/one.cpp").write_text("int one() { return 3; }\n")
    assert build(tree, is_checkout=True) != first
    assert calls(compiler_log, "csrc/one.cpp") == 2
    assert calls(compiler_log, "python/module.cpp") == 1
    (tree / "csrc/one.h").write_text("int one();  // a header\n")
    build(tree, is_checkout=True)
    assert calls(compiler_log, "python/module.cpp") == 2


def test_the_key_follows_contents_and_names_and_not_times(tree: Path) -> None:
    keys = [BuildPlan(SourceTree(tree)).key]
    os.utime(tree / "csrc/one.cpp", (0, 0))
    assert BuildPlan(SourceTree(tree)).key == keys[0]
    (tree / "csrc/one.cpp").write_text("int one() { return 4; }\n")
    keys.append(BuildPlan(SourceTree(tree)).key)
    (tree / "csrc/one.cpp").rename(tree / "csrc/uno.cpp")
    keys.append(BuildPlan(SourceTree(tree)).key)
    keys.append(BuildPlan(SourceTree(tree), cuda_home=Path("/cuda")).key)
    assert len(set(keys)) == len(keys)


def test_the_key_follows_torch_and_python(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = toolchain.torch_facts()
    keys = {BuildPlan(SourceTree(tree)).key}
    for name in facts:
        monkeypatch.setattr(toolchain, "torch_facts", lambda name=name: {**facts, name: "other"})
        keys.add(BuildPlan(SourceTree(tree)).key)
    assert len(keys) == 1 + len(facts)


def test_processes_that_start_together_compile_once(
    tree: Path, build_cache: Path, compiler_log: Path
) -> None:
    processes = [start_build(tree) for _ in range(4)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    assert calls(compiler_log, "csrc/one.cpp") == 1
    assert calls(compiler_log, "python/module.cpp") == 1
    assert sum("compiling the C++ core" in stderr for stderr in errors) == 1


def test_a_compile_error_shows_the_first_error(tree: Path, build_cache: Path) -> None:
    (tree / "csrc/one.cpp").write_text("\nint one() { return missing_name; }\nint x = y;\n")
    with pytest.raises(BuildError) as caught:
        build(tree)
    text = str(caught.value)
    first = text.partition("The first error:")[2].strip()
    assert first.startswith("csrc/one.cpp:2:20: error: ")
    assert "missing_name" in first.splitlines()[0]
    assert "python -m dualpipe_ext build" in text
    assert "build.log" in text
    assert not list(build_cache.glob("built/*/*"))


def test_after_a_compile_error_the_next_build_works(tree: Path, build_cache: Path) -> None:
    good = (tree / "csrc/one.cpp").read_text()
    (tree / "csrc/one.cpp").write_text("int one() {\n")
    with pytest.raises(BuildError):
        build(tree)
    (tree / "csrc/one.cpp").write_text(good)
    assert build(tree).is_file()


def test_a_missing_compiler_says_what_to_install(
    tree: Path, build_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tree))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler.*apt-get install g\+\+"):
        build(tree)
    monkeypatch.setenv("CXX", "no-such-compiler")
    toolchain.find_compiler.cache_clear()
    with pytest.raises(BuildError, match="CXX is 'no-such-compiler'"):
        build(tree)


def test_what_is_built_loads_without_a_compiler(
    tree: Path, build_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    library = build(tree)
    monkeypatch.setenv("PATH", str(tree))
    toolchain.find_compiler.cache_clear()
    assert build(tree) == library


def test_another_compiler_builds_again(
    tree: Path, build_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = toolchain.require_compiler().command
    libraries = set()
    for name in ("c++-1", "c++-2"):
        write_compiler(tmp_path / name, f'exec {real} "$@"', monkeypatch)
        libraries.add(build(tree))
    assert len(libraries) == 2


def test_a_build_that_is_killed_leaves_no_library(
    tree: Path, build_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, started = toolchain.require_compiler().command, tmp_path / "started"
    slow = f'case "$*" in *-shared*) touch {started}; sleep 60;; esac; exec {real} "$@"'
    write_compiler(tmp_path / "c++", slow, monkeypatch)
    process = start_build(tree)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(build_cache.glob("built/*/*"))
    write_compiler(tmp_path / "c++", f'exec {real} "$@"', monkeypatch)
    assert build(tree).is_file()


def test_a_cache_that_cannot_be_written_says_so(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DUALPIPE_EXT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BuildError, match=r"cannot be written.*DUALPIPE_EXT_CACHE"):
        build(tree)


def test_old_entries_are_dropped(tree: Path, build_cache: Path) -> None:
    for i in range(MAX_ENTRIES + 3):
        stale = build_cache / "built" / f"stale-{i}"
        stale.mkdir(parents=True)
        os.utime(stale, (i, i))
    build(tree)
    left = {path.name for path in (build_cache / "built").iterdir()}
    assert len(left) == MAX_ENTRIES
    assert "stale-3" not in left
    assert f"stale-{MAX_ENTRIES + 2}" in left


def test_a_library_that_does_not_load_says_how_to_build_again(tmp_path: Path) -> None:
    (tmp_path / "_C.so").write_bytes(b"not a library")
    loaded = sys.modules["dualpipe_ext._C"]
    with pytest.raises(BuildError, match=r"cannot be loaded.*build --force"):
        _native.load_library(tmp_path / "_C.so")
    assert sys.modules["dualpipe_ext._C"] is loaded


@pytest.mark.parametrize(("name", "value"), [("DUALPIPE_EXT_CUDA", "yes"), ("MAX_JOBS", "0")])
def test_a_bad_option_is_an_error(
    name: str, value: str, tree: Path, build_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(BuildError, match=f"{name} is '{value}'"):
        ensure_built(make_plan(sources=SourceTree(tree)))


def test_cuda_that_was_asked_for_and_is_not_there_is_an_error(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "torch_cuda_version", lambda: None)
    monkeypatch.setenv("DUALPIPE_EXT_CUDA", "1")
    with pytest.raises(BuildError, match=r"torch .* is a build without CUDA"):
        make_plan(sources=SourceTree(tree))


def test_cuda_files_are_whole_files_in_the_build_or_not(tree: Path) -> None:
    (tree / "csrc/device").mkdir()
    (tree / "csrc/device/cuda_stream.cpp").touch()
    (tree / "python/bind_cuda_engine.cpp").touch()
    sources = SourceTree(tree)
    assert sources.compiled(cuda=False) == ["python/module.cpp", "csrc/one.cpp"]
    assert len(sources.compiled(cuda=True)) == 4


def test_progress_is_one_line_on_a_terminal_and_few_lines_elsewhere() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        progress = Progress(stream)
        for done in range(1, 11):
            progress.step(done, 10, f"csrc/file_{done}.cpp")
        progress.finish()
    assert terminal.getvalue().count("\r") == 11
    assert "[ 7/10] csrc/file_7.cpp" in terminal.getvalue()
    assert "\n" not in terminal.getvalue()
    assert file.getvalue() == "dualpipe_ext: [10/10] csrc/file_10.cpp (0 s)\n"


def test_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DUALPIPE_EXT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache().root == tmp_path / "dualpipe_ext"
