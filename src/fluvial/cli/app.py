"""The application itself: the parser every command is added to, and how an error ends one."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from fluvial.errors import FluvialError

app = typer.Typer(
    help="Fluvial: load, convert, sample, train, straighten and measure any diffusion or flow model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Options of every command."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; an error is one line on standard error and exit code 2, an interruption 130."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    try:
        code = app([a for a in arguments if a != "--debug"], prog_name="fluvial", standalone_mode=False)
    except FluvialError as error:
        _fail(error, str(error), 2, debug)
    except Exception as error:
        # The parser's own errors, of a class that moves between its versions, all have this.
        if hasattr(error, "format_message"):
            _fail(error, error.format_message(), 2, debug)  # type: ignore[attr-defined]
        _fail(error, f"{type(error).__name__}: {error}; --debug shows where", 1, debug)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: Exception, message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        raise error
    Console(stderr=True).print(f"[bold red]error:[/bold red] {escape(message)}", soft_wrap=True, highlight=False)
    sys.exit(code)
