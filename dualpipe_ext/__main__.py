"""The command line: ``python -m dualpipe_ext build``, ``info``, ``plan`` and ``verify``."""

from __future__ import annotations

import json
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dualpipe_ext._build import BuildError, ensure_built, make_plan
from dualpipe_ext._build.info import collect_info
from dualpipe_ext._build.plan import find_prebuilt
from dualpipe_ext._build.toolchain import CudaOption
from dualpipe_ext._schedule_commands import plan as plan_schedule
from dualpipe_ext._schedule_commands import verify as verify_schedule

WIDTH_OF_FILES = 1000
"""Columns when the output is not a terminal, so that no line is ever wrapped."""

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _fail(error: BuildError) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(1)


@app.command()
def build(
    cuda: Annotated[
        Optional[bool],  # noqa: UP045  (typer reads annotations at run time, on Python 3.10 too)
        typer.Option("--cuda/--no-cuda", help="Default: DUALPIPE_EXT_CUDA, else what is there."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Compile every file again.")] = False,
) -> None:
    """Compile the C++ core for the installed torch, ahead of the first import."""
    option: CudaOption | None = None if cuda is None else "on" if cuda else "off"
    try:
        plan = make_plan(option)
        library = None if force else find_prebuilt(plan)
        library = library or ensure_built(plan, force=force)
    except BuildError as error:
        raise _fail(error) from None
    typer.echo(library)


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show what was built, and with what."""
    try:
        facts = collect_info()
    except BuildError as error:
        raise _fail(error) from None
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_OF_FILES
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(f"[bold]{name.replace('_', ' ')}", escape(value))
    console.print(table)


app.command("plan")(plan_schedule)
app.command("verify")(verify_schedule)


if __name__ == "__main__":
    app(prog_name="python -m dualpipe_ext")
