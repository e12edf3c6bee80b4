"""What is installed here, what was built, and with what."""

from __future__ import annotations

import json
import sys

from dualpipe_ext import __version__
from dualpipe_ext._build import toolchain
from dualpipe_ext._build.cache import RECORD_NAME, default_cache
from dualpipe_ext._build.plan import (
    PREBUILT_RECORD_NAME,
    BuildPlan,
    find_prebuilt,
    make_plan,
)


def collect_info() -> dict[str, str]:
    """Returns names and values, in the order in which to show them."""
    plan, cache, compiler = make_plan(), default_cache(), toolchain.find_compiler()
    cuda_home = toolchain.find_cuda_home()
    return {
        "version": __version__,
        "python": sys.version.partition(" ")[0],
        "torch": f"{plan.facts['torch']} in {toolchain.torch_root()}",
        "torch_cuda": str(toolchain.torch_cuda_version()),
        "cuda_toolkit": "none found" if cuda_home is None else str(cuda_home),
        "build_with_cuda": "no" if plan.cuda_home is None else "yes",
        "compiler": "none found"
        if compiler is None
        else f"{compiler.command} ({compiler.version})",
        "sources": f"{plan.sources.root} (digest {plan.sources.digest})",
        "cache": str(cache.root),
        **_built(plan),
    }


def _built(plan: BuildPlan) -> dict[str, str]:
    """Returns facts about the library that an import would load now."""
    prebuilt = find_prebuilt(plan)
    if prebuilt is not None:
        library, record_path = prebuilt, prebuilt.parent / PREBUILT_RECORD_NAME
    else:
        cached = default_cache().find(plan)
        if cached is None:
            return {"extension": "not built yet: the first import builds it"}
        library, record_path = cached, cached.parent / RECORD_NAME
    record = json.loads(record_path.read_text())
    return {
        "extension": str(library),
        "extension_kind": "compiled at install" if prebuilt else "cached",
        "built_at": str(record["built_at"]),
        "built_with": f"{record['compiler']}, {record['flags']}",
        "build_seconds": str(record["build_seconds"]),
    }
