"""`python -m launch COMMAND`: adapt an open Llama-family checkpoint to a new language or domain, and release it."""

import importlib
import os
import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from tlite_jax.errors import CorruptionError, SpikesError, UserError

# command -> module of this package whose `main` is the command, or whose `app` holds several
COMMANDS = {
    "quickstart": "quickstart",
    "corpus": "corpus",
    "import": "import_",
    "label": "label",
    "prepare": "prepare",
    "mixture": "mixture",
    "doctor": "doctor",
    "plan": "plan",
    "submit": "submit",
    "train": "train",
    "rewind": "rewind",
    "eval": "eval_",
    "generate": "generate",
    "export": "export",
    "gate": "gate",
    "report": "report",
    "verify": "verify",
    "recipe": "recipe",
    "card": "card",
    "push": "push",
}
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class _CommandInterruptedError(Exception):
    """Ctrl-C during a command, where Typer would end without a word."""


class _Commands(TyperGroup):
    """Lists commands in the order of a run, not of the alphabet."""

    def list_commands(self, ctx: object) -> list[str]:
        return list(COMMANDS)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _CommandInterruptedError from error


def build_app() -> typer.Typer:
    """Assembles the commands; their modules import what is heavy only when they run."""
    app = typer.Typer(
        name="python -m launch",
        help=__doc__,
        cls=_Commands,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name, module in COMMANDS.items():
        loaded = importlib.import_module(f"launch.{module}")
        if hasattr(loaded, "app"):  # a command of several
            app.add_typer(loaded.app, name=name)
        else:
            app.command(name)(loaded.main)

    @app.callback()
    def options(debug: bool = typer.Option(False, "--debug", help="Show the trace of an error.")) -> None:
        if debug:
            os.environ["TLITE_DEBUG"] = "1"

    return app


def main() -> None:
    """Runs a command; errors become one line and an exit status (docs/training.md lists them)."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is absent is no news
    try:
        build_app()()
    except UserError as error:
        _fail(error, EXIT_USAGE)
    except (SpikesError, CorruptionError) as error:
        _fail(error, error.exit_status)
    except (KeyboardInterrupt, _CommandInterruptedError) as error:
        _fail(error, EXIT_INTERRUPTED, "interrupted; start the same command again to go on")
    except Exception as error:
        _fail(error, EXIT_FAILED, f"{type(error).__name__}: {error}")


def _fail(error: BaseException, status: int, line: str | None = None) -> None:
    if os.environ.get("TLITE_DEBUG"):
        traceback.print_exception(error)
    first_line = (line or str(error)).strip().splitlines()[0:1] or [type(error).__name__]
    print(f"error: {first_line[0]}", file=sys.stderr, flush=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
