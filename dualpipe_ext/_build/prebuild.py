"""Compiles the extension into a package folder, for ``setup.py`` if torch is present.

Run as ``python -m dualpipe_ext._build.prebuild FOLDER`` from a source tree; it needs neither the
command line's nor the package's other dependencies.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dualpipe_ext._build import BuildError, ensure_built, make_plan
from dualpipe_ext._build.cache import RECORD_NAME, install
from dualpipe_ext._build.plan import PREBUILT_NAME, PREBUILT_RECORD_NAME


def prebuild(folder: Path) -> Path:
    """Builds for the installed torch; returns the library, which is then in ``folder``."""
    library = ensure_built(make_plan())
    record = json.loads((library.parent / RECORD_NAME).read_text())
    install(library, folder, record, PREBUILT_NAME, PREBUILT_RECORD_NAME)
    return folder / PREBUILT_NAME


if __name__ == "__main__":
    try:
        prebuild(Path(sys.argv[1]))
    except BuildError as error:
        sys.exit(f"error: {error}")
