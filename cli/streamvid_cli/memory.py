"""``streamvid memory``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from streamvid.memory.bank import Bank, default_folder
from streamvid.memory.catalog import SourceRecord
from streamvid.query.evidence import clock
from streamvid_cli import options, render

app = typer.Typer(help="What is remembered, and how to forget it.", no_args_is_help=True)
Which = Annotated[str, typer.Argument(help="A number from `memory list`, the start of a key, or a file name.")]


def _open(folder: options.Memory) -> Bank:
    return Bank.open(folder if folder is not None else default_folder())


@app.command("list")
def list_(memory: options.Memory = None, json: options.Json = False) -> None:
    """List the remembered videos."""
    with _open(memory) as bank:
        rows = [_row(source) for source in bank.sources()]
        if json:
            render.emit_json({"folder": str(bank.folder), "bytes": bank.usage(), "sources": rows})
            return
        if not rows:
            render.stderr().print(f"nothing is remembered in {bank.folder}", markup=False)
            return
        render.show_table(
            ("id", "name", "state", "length", "tokens", "MB", "key"),
            [
                (
                    str(r["id"]),
                    r["name"],
                    r["state"],
                    clock(r["seconds"]),
                    f"{r['tokens']:,}",
                    f"{r['bytes'] / 1e6:.2f}",
                    r["key"],
                )
                for r in rows
            ],
        )


@app.command()
def show(which: Which, memory: options.Memory = None, json: options.Json = False) -> None:
    """Show one remembered video: its key, spans, size per hour, and the answers given from it."""
    with _open(memory) as bank:
        source = bank.source(int(which) if which.isdigit() else which)
        spans = bank.spans(source.id)
        answers = bank.answers(source.id)
        row = _row(source)
        hours = max(row["seconds"], 1e-9) / 3600
        row |= {
            "megabytes_per_hour": round(row["bytes"] / 1e6 / hours, 2),
            "made_with": source.key.to_json(),
            "spans": [[float(s.start), float(s.stop), s.tokens] for s in spans],
            "answers": [{"question": a.question, "answer": a.answer} for a in answers],
        }
        if json:
            render.emit_json(row)
            return
        for name in (
            "id",
            "name",
            "path",
            "state",
            "seconds",
            "tokens",
            "bytes",
            "megabytes_per_hour",
            "key",
            "made_with",
        ):
            typer.echo(f"{name}: {row[name]}")
        typer.echo("spans (seconds, tokens):")
        for span in spans:
            typer.echo(f"  {clock(float(span.start))}-{clock(float(span.stop))}  {span.tokens}")
        for answer in answers:
            typer.echo(f"Q: {answer.question}\nA: {answer.answer}")


@app.command()
def rm(which: Which, memory: options.Memory = None, json: options.Json = False) -> None:
    """Forget one remembered video."""
    with _open(memory) as bank:
        gone = bank.remove(int(which) if which.isdigit() else which)
        if json:
            render.emit_json(_row(gone))
        else:
            typer.echo(f"forgot {gone.name} ({gone.num_bytes / 1e6:.2f} MB)")


def _row(source: SourceRecord) -> dict[str, Any]:
    return {
        "id": source.id,
        "name": source.name,
        "path": source.path,
        "state": source.state.value,
        "seconds": float(source.duration if source.duration is not None else source.stop or 0),
        "tokens": source.tokens,
        "bytes": source.num_bytes,
        "key": source.key.short,
        "created": source.created.isoformat(timespec="seconds"),
    }
