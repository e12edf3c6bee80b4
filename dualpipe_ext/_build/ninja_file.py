"""The ninja file of one build: compile each source, link once."""

from __future__ import annotations

from pathlib import Path

from dualpipe_ext._build import toolchain
from dualpipe_ext._build.plan import BuildPlan

LIBRARY = "_C.so"

_RULES = """\
ninja_required_version = 1.5

rule compile
  command = {compiler} {compile_flags} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $in

rule link
  command = {compiler} @$out.rsp {link_flags} -o $out
  rspfile = $out.rsp
  rspfile_content = $in
  description = linking
"""


def ninja_text(plan: BuildPlan, compiler: str) -> str:
    """Returns the text. Paths are relative to the work folder, so messages read ``csrc/...``."""
    sources = plan.sources.compiled(cuda=plan.cuda_home is not None)
    objects = [f"obj/{name}.o" for name in sources]
    rules = _RULES.format(
        compiler=_escape(compiler),
        compile_flags=" ".join(map(_escape, toolchain.compile_flags(plan.cuda_home))),
        link_flags=" ".join(map(_escape, toolchain.link_flags(plan.cuda_home))),
    )
    edges = [
        f"build {object_}: compile {source}"
        for object_, source in zip(objects, sources, strict=True)
    ]
    return "\n".join([rules, *edges, f"build {LIBRARY}: link {' '.join(objects)}", ""])


def stage(plan: BuildPlan, work: Path) -> None:
    """Makes the sources in ``work`` equal to the plan's.

    A file is written only if its content differs, so that ninja, which compares times, in effect
    compares contents. What is compiled is exactly what the plan's digest covers.
    """
    for name, content in plan.sources.files.items():
        path = work / name
        if not (path.is_file() and path.read_bytes() == content):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for folder in ("csrc", "python"):
        for path in (work / folder).rglob("*"):
            if path.is_file() and path.relative_to(work).as_posix() not in plan.sources.files:
                path.unlink()


def _escape(word: str) -> str:
    quoted = f"'{word}'" if any(c in word for c in " \t;&()'\"") else word
    return quoted.replace("$", "$$")
