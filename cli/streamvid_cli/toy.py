"""``streamvid toy``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamvid.toy.video import render as render_scene
from streamvid_cli import options, render

app = typer.Typer(help="The toy world: videos whose events are known.", no_args_is_help=True)


@app.callback()
def root() -> None:
    """The toy world: videos whose events are known."""


@app.command("render")
def render_(
    out: Annotated[Path, typer.Option(help="Where the mp4 goes; the JSON with events and questions goes beside it.")],
    seed: Annotated[int, typer.Option(help="The same seed draws the same scene.")] = 0,
    seconds: Annotated[int, typer.Option(help="Length, at least 4.")] = 16,
    size: Annotated[str, typer.Option(help="Height of a square in pixels, or WIDTHxHEIGHT; even numbers.")] = "256",
    events: Annotated[int | None, typer.Option(help="How many shapes come and go. Default: 1 to 3.")] = None,
    background: Annotated[str | None, typer.Option(help="plain, gradient or busy. Default: drawn.")] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Draw only colour-shape pairs the toy model was never shown.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Render a scene of coloured shapes as H.264, with its events, questions and right answers."""
    paths = render_scene(seed, out, seconds=seconds, size=size, events=events, background=background, held_out=held_out)
    if json:
        render.emit_json({"video": str(paths[0]), "truth": str(paths[1])})
    else:
        typer.echo(f"{paths[0]}\n{paths[1]}")
