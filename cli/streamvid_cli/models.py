"""``streamvid models``."""

from __future__ import annotations

import typer

from streamvid.models import checkpoints
from streamvid_cli import options, render

app = typer.Typer(help="Checkpoints: which are known, which are here.", no_args_is_help=True)


@app.command("list")
def list_(json: options.Json = False) -> None:
    """List the known checkpoints, their sizes and whether they are in the local cache."""
    rows = [
        {
            "name": known.repository,
            "family": "qwen3_vl",
            "download_gigabytes": known.gigabytes,
            "memory_gigabytes": known.memory_gigabytes,
            "here": checkpoints.cached(known.repository) is not None,
        }
        for known in checkpoints.KNOWN
    ]
    toy = checkpoints.toy_folder() / "model.safetensors"
    size = toy.stat().st_size / 1e9 if toy.is_file() else 0.0
    rows.append(
        {
            "name": "toy",
            "family": "qwen3_vl",
            "download_gigabytes": 0.0,
            "memory_gigabytes": round(size * 4, 3),
            "here": toy.is_file(),
        }
    )
    if json:
        render.emit_json(rows)
        return
    render.show_table(
        ("name", "family", "download GB", "memory GB", "here"),
        [
            (
                str(r["name"]),
                str(r["family"]),
                str(r["download_gigabytes"]),
                str(r["memory_gigabytes"]),
                "yes" if r["here"] else "no",
            )
            for r in rows
        ],
    )
