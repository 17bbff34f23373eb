"""The ``streamvid`` command: its sub-commands and the one place where errors become a line and a code."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from streamvid.errors import StreamvidError

COMMANDS = {
    "ask": "Ask a video one or several questions; it is watched once and remembered.",
    "live": "Watch cameras, remember what they show, and answer questions about now and about the past.",
    "watch-replay": "Run a rule over recordings as fast as they decode, and tell what it would have found.",
    "alerts": "What standing questions found: list it, or have it delivered again.",
    "clip": "Write what a live stream showed from one moment to another, where it was watched with --record.",
    "probe": "Tell what each source is: container, codec, size, exact times, colour, streams, decoder.",
    "doctor": "Check what is installed, which devices and checkpoints are here, and what each missing piece would "
    "give.",
    "methods": "Token-reduction methods: what there is, what each does and can be set to.",
    "models": "Checkpoints: which are known, which are here.",
    "memory": "What is remembered: look, mend, move, forget.",
    "toy": "The toy world: videos whose events are known.",
}
"""What ``--help`` lists, in this order; each is a module beside this one, imported when it is called."""

UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""Of the click that typer brings along, which need not be the one that is installed."""

INTERRUPTED = 130


class Commands(TyperGroup):
    """Imports a sub-command when it is called: importing all of them takes seconds."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that the first argument names."""
        if args and args[0] in COMMANDS:
            self.commands[args[0]] = command(args[0])
        return super().resolve_command(ctx, args)


def command(name: str) -> Any:
    """A sub-command, or group of them, with its options."""
    module = import_module(f"streamvid_cli.{name.replace('-', '_')}")
    holder = typer.Typer()
    holder.callback()(lambda: None)
    if hasattr(module, "app"):
        holder.add_typer(module.app, name=name)
    else:
        holder.command(name)(getattr(module, name.replace("-", "_")))
    group = typer.main.get_command(holder)
    assert isinstance(group, TyperGroup)
    return group.commands[name]


app = typer.Typer(
    name="streamvid",
    cls=Commands,
    help="Memory for video language models: ask a video, keep what was seen, ask again at once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _help in COMMANDS.items():
    app.command(_name, help=_help)(lambda: None)


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
