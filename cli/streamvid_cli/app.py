"""The ``streamvid`` command: its sub-commands and the one place where errors become a line and a code."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from streamvid.errors import StreamvidError
from streamvid_cli import ask, doctor, memory, methods, models, probe, toy

UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""Of the click that typer brings along, which need not be the one that is installed."""

INTERRUPTED = 130

app = typer.Typer(
    name="streamvid",
    help="Memory for video language models: ask a video, keep what was seen, ask again at once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("ask")(ask.ask)
app.command("probe")(probe.probe)
app.command("doctor")(doctor.doctor)
app.add_typer(methods.app, name="methods")
app.add_typer(models.app, name="models")
app.add_typer(memory.app, name="memory")
app.add_typer(toy.app, name="toy")


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"streamvid {version('streamvid')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks instead of one line.")] = False,
) -> None:
    """Memory for video language models."""
    if debug:
        os.environ["STREAMVID_DEBUG"] = "1"


def main() -> None:
    """Run the command; 0 done, 1 our error, 2 usage, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        sys.exit(run())
    except BrokenPipeError:
        # whoever read our output has seen enough; point stdout elsewhere so that the exit flush is silent
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def run(arguments: list[str] | None = None) -> int:
    """Run with the given arguments (default: the process's own) and return the exit code."""
    code = 0
    try:
        result = app(arguments, standalone_mode=False)
        code = int(result) if isinstance(result, int) else 0
    except typer.Exit as leave:
        code = leave.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except UsageError as error:
        error.show()  # type: ignore[attr-defined]
        return 2
    except StreamvidError as error:
        if os.environ.get("STREAMVID_DEBUG"):
            raise
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    except BrokenPipeError:
        raise
    except Exception as error:  # a mistake of ours; the traceback is for whoever mends it
        if os.environ.get("STREAMVID_DEBUG"):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())
        sys.stderr.write(f"error: this is a bug in streamvid ({what}); what was stored is safe, --debug shows where\n")
        return 1
    if code == INTERRUPTED:
        sys.stderr.write("\ninterrupted; what was watched is remembered, the same command goes on from there\n")
    return code


if __name__ == "__main__":
    main()
