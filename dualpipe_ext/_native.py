"""Loads the native extension ``dualpipe_ext._C``: the one in the package, or the cached one."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from dualpipe_ext._build import BuildError, ensure_built, make_plan
from dualpipe_ext._build.plan import find_prebuilt

MODULE_NAME = "dualpipe_ext._C"


def load_extension() -> ModuleType:
    """Returns the extension module, compiling it first if needed; the same one on every call.

    Raises:
        BuildError: it cannot be compiled or loaded; says why and what to do.
    """
    loaded = sys.modules.get(MODULE_NAME)
    if loaded is not None:
        return loaded
    plan = make_plan()
    return load_library(find_prebuilt(plan) or ensure_built(plan))


def runs_as_command() -> bool:
    """Whether the package is being imported for ``python -m dualpipe_ext``.

    The command line builds and inspects the extension, so it must start without it.
    """
    if sys.argv[:1] != ["-m"] or "-m" not in sys.orig_argv:
        return False
    target = sys.orig_argv[sys.orig_argv.index("-m") + 1]
    return target == "dualpipe_ext" or target.startswith("dualpipe_ext._build")


def load_library(library: Path) -> ModuleType:
    """Loads ``library`` as :data:`MODULE_NAME`, and makes it an attribute of the package."""
    loader = importlib.machinery.ExtensionFileLoader(MODULE_NAME, str(library))
    spec = importlib.util.spec_from_file_location(MODULE_NAME, library, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise BuildError(
            f"{library} was compiled and cannot be loaded: {error}. Compile it again: "
            "python -m dualpipe_ext build --force"
        ) from error
    sys.modules[MODULE_NAME] = module
    setattr(sys.modules["dualpipe_ext"], "_C", module)  # noqa: B010  (mypy knows no such name)
    return module
