"""Compiles the C++ core against the torch that is installed: once, into a cache."""

from dualpipe_ext._build.builder import ensure_built
from dualpipe_ext._build.errors import BuildError
from dualpipe_ext._build.plan import BuildPlan, make_plan

__all__ = ["BuildError", "BuildPlan", "ensure_built", "make_plan"]
