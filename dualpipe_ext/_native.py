"""Loads the native extension ``dualpipe_ext._C``: the one in the package, or the cached one."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

from dualpipe_ext._build import BuildError, BuildPlan, ensure_built, make_plan

MODULE_NAME = "dualpipe_ext._C"
PREBUILT_NAME = "_C" + importlib.machinery.EXTENSION_SUFFIXES[0]
PREBUILT_RECORD_NAME = "_C.json"


def load_extension() -> ModuleType:
    """The extension module, compiled first if need be; the same one on every call.

    Raises:
        BuildError: it cannot be compiled or loaded; says why and what to do.
    """
    loaded = sys.modules.get(MODULE_NAME)
    if loaded is not None:
        return loaded
    plan = make_plan()
    return _load(find_prebuilt(plan) or ensure_built(plan))


def find_prebuilt(plan: BuildPlan) -> Path | None:
    """The library that was compiled at install time, if it fits what is there now."""
    package = Path(__file__).resolve().parent
    library, record = package / PREBUILT_NAME, package / PREBUILT_RECORD_NAME
    if library.is_file() and record.is_file() and json.loads(record.read_text())["key"] == plan.key:
        return library
    return None


def runs_as_command() -> bool:
    """Whether the package is being imported for ``python -m dualpipe_ext``.

    The command line builds and inspects the extension, so it must start without it.
    """
    if sys.argv[:1] != ["-m"] or "-m" not in sys.orig_argv:
        return False
    target = sys.orig_argv[sys.orig_argv.index("-m") + 1]
    return target == "dualpipe_ext" or target.startswith("dualpipe_ext._build")


def _load(library: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(MODULE_NAME, str(library))
    spec = importlib.util.spec_from_file_location(MODULE_NAME, library, loader=loader)
    assert spec is not None
    try:
        module = sys.modules[MODULE_NAME] = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        sys.modules.pop(MODULE_NAME, None)
        raise BuildError(
            f"{library} was compiled and cannot be loaded: {error}. Compile it again: "
            "python -m dualpipe_ext build --force"
        ) from error
    package = sys.modules.get("dualpipe_ext")
    if package is not None:
        package._C = module  # type: ignore[attr-defined]
    return module
