"""The command line: ``python -m dualpipe_ext build`` and ``python -m dualpipe_ext info``."""

from __future__ import annotations

import json
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from dualpipe_ext._build import BuildError, ensure_built, make_plan
from dualpipe_ext._build.info import collect_info

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
    option = None if cuda is None else "on" if cuda else "off"
    try:
        library = ensure_built(make_plan(option), force=force)  # type: ignore[arg-type]
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
    table = Table(title="dualpipe_ext", show_header=False, title_justify="left")
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), str(value), style=None)
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    app(prog_name="python -m dualpipe_ext")
