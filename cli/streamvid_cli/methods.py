"""``streamvid methods``."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer

from streamvid.errors import SettingsError, near
from streamvid.temporal.methods.base import Method
from streamvid.temporal.methods.registry import methods
from streamvid_cli import options, render

app = typer.Typer(
    help="Token-reduction methods: what there is, what each does and can be set to.", no_args_is_help=True
)


@app.command("list")
def list_(
    json: options.Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the README.")] = False,
) -> None:
    """List all methods, in the order of the stages data passes."""
    rows = [
        (name, cls.stage.value, idea(cls), cls.paper, "yes" if cls.causal else "per clip")
        for name, cls in methods().items()
    ]
    if json:
        render.emit_json([_described(name, cls) for name, cls in methods().items()])
    elif markdown:
        typer.echo("| id | stage | idea | paper | causal |\n|---|---|---|---|---|")
        for row in rows:
            typer.echo("| " + " | ".join(("`" + row[0] + "`", *row[1:])) + " |")
    else:
        render.show_table(("id", "stage", "idea", "paper", "causal"), rows)


@app.command()
def show(name: Annotated[str, typer.Argument(help="Id of the method.")], json: options.Json = False) -> None:
    """Show what a method does, its paper and its settings."""
    known = methods()
    if name not in known:
        raise SettingsError(f"there is no method {name!r}; {near(name, known)}")
    described = _described(name, known[name])
    if json:
        render.emit_json(described)
        return
    typer.echo(
        f"{name} ({described['stage']})\n\n{inspect.cleandoc(known[name].__doc__ or '')}\n\npaper: {described['paper']}"
    )
    needs = described["needs"]
    typer.echo(f"needs: {', '.join(needs) if needs else 'nothing but tokens'}; positions: {described['positions']}")
    typer.echo("settings:")
    for key, value in described["settings"].items():
        typer.echo(f"  {key} = {value}")


def idea(cls: type[Method]) -> str:
    """The first line of a method's docstring."""
    return inspect.cleandoc(cls.__doc__ or "").splitlines()[0].rstrip(".")


def _described(name: str, cls: type[Method]) -> dict[str, Any]:
    settings: dict[str, object] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.init:
            value = field.default if field.default is not dataclasses.MISSING else None
            settings[field.name] = value if isinstance(value, str | int | float | bool | type(None)) else repr(value)
    return {
        "id": name,
        "stage": cls.stage.value,
        "idea": idea(cls),
        "paper": cls.paper,
        "needs": sorted(n.value for n in cls.needs),
        "causal": cls.causal,
        "weights": cls.weights,
        "positions": cls.positions.value,
        "settings": settings,
    }
