"""``streamvid alerts``: what standing questions found, and what became of it."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from streamvid.errors import SettingsError
from streamvid.memory.place import default_folder
from streamvid.watch.alerts import FILE_NAME, Alerts, Queued
from streamvid_cli import options, render

app = typer.Typer(
    help="What standing questions found: list it, or have it delivered again.",
    invoke_without_command=True,
    no_args_is_help=False,
)

Stream = Annotated[str | None, typer.Option("--stream", help="Only of this stream.")]
Limit = Annotated[int, typer.Option(help="At most so many waiting and so many that are over, newest first.")]


@app.callback()
def bare(context: typer.Context, memory: options.Memory = None) -> None:
    """What standing questions found: list it, or have it delivered again."""
    if context.invoked_subcommand is None:
        list_(memory=memory)


@app.command("list")
def list_(
    memory: options.Memory = None,
    stream: Stream = None,
    limit: Limit = 50,
    json: options.Json = False,
) -> None:
    """List what waits for delivery, then what was delivered, expired or failed."""
    with _queue(memory) as alerts:
        found = [*alerts.waiting(stream=stream, limit=limit), *alerts.over(stream=stream, limit=limit)]
        counts = alerts.counts()
    if json:
        render.emit_json({"counts": counts, "alerts": [_told(one) for one in found]})
        return
    rows = [
        [one.alert.id, one.state.value, message["wall"][:19], one.alert.stream, one.alert.rule, one.note or "-"]
        for one in found
        for message in [one.alert.message()]
    ]
    if rows:
        render.show_table(["id", "state", "when (UTC)", "stream", "rule", "note"], rows)
    sys.stderr.write(", ".join(f"{count} {state}" for state, count in counts.items()) + "\n")


@app.command()
def retry(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Of alerts that failed or expired.")],
    memory: options.Memory = None,
    json: options.Json = False,
) -> None:
    """Have alerts that failed or expired delivered again, by the next `streamvid live` on this memory."""
    with _queue(memory) as alerts:
        for id in ids:
            if alerts.get(id) is None:
                raise SettingsError(f"no alert has the id {id!r}; see them with: streamvid alerts list")
        again = {id: alerts.retry(id) for id in ids}
    if json:
        render.emit_json({"waiting_again": [id for id, done in again.items() if done]})
        return
    for id, done in again.items():
        sys.stdout.write(f"{id} {'waits again' if done else 'is left: it waits or was delivered'}\n")


def _queue(memory: Any) -> Alerts:
    folder = memory if memory is not None else default_folder()
    if not (folder / FILE_NAME).exists():
        raise SettingsError(f"no alerts were ever raised in {folder}; watch for something: streamvid live --watch ...")
    return Alerts(folder)


def _told(one: Queued) -> dict[str, Any]:
    return {**one.alert.message(), "state": one.state.value, "note": one.note}
