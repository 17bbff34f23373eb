"""``streamvid doctor``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from typing import Any

import torch
import typer

from streamvid.memory.place import default_folder
from streamvid.models import checkpoints
from streamvid_cli import options, render

PIECES = (
    ("torch", "torch", "runs the models", "pip install -c constraints.txt -e '.[cpu]'"),
    ("transformers", "transformers", "loads the models", "pip install -c constraints.txt -e '.[cpu]'"),
    ("av", "av", "reads video files", "pip install -c constraints.txt -e '.[cpu]'"),
    ("faiss", "faiss-cpu", "searches large memories fast", "pip install -c constraints.txt -e '.[cpu]'"),
    (
        "decord",
        "decord",
        "another decoder, x86 only: --decoder decord",
        "pip install -c constraints.txt -e '.[cpu,decord]'",
    ),
    (
        "torchcodec",
        "torchcodec",
        "another decoder, where FFmpeg is installed: --decoder torchcodec",
        "pip install -c constraints.txt -e '.[cpu,torchcodec]'",
    ),
)


def doctor(json: options.Json = False) -> None:
    """Check what is installed, which devices and checkpoints are here, and what each missing piece would give."""
    report = examine()
    if json:
        render.emit_json(report)
        return
    typer.echo(
        f"streamvid {report['streamvid']}, Python {report['python']}, {report['platform']}, {report['cores']} cores"
    )
    for piece in report["packages"]:
        if piece["version"]:
            typer.echo(f"  ok       {piece['package']} {piece['version']}: {piece['gives']}")
        else:
            typer.echo(f"  missing  {piece['package']}: {piece['gives']}; install: {piece['install']}")
    for device in report["devices"]:
        typer.echo(f"  device   {device['name']}: {device['gigabytes']:.0f} GB")
    for model in report["models"]:
        typer.echo(f"  {'ok      ' if model['here'] else 'not here'} {model['name']}: {model['note']}")
    typer.echo(f"  memory   {report['memory']['folder']}: {report['memory']['note']}")
    for advice in report["advice"]:
        typer.echo(f"advice: {advice}")


def examine() -> dict[str, Any]:
    """Everything ``doctor`` finds, as plain values."""
    packages = [
        {
            "package": package,
            "version": _version(package) or _version("faiss-gpu" if module == "faiss" else package),
            "gives": gives,
            "install": install,
            "importable": importlib.util.find_spec(module) is not None,
        }
        for module, package, gives, install in PIECES
    ]
    devices = [{"name": "cpu", "gigabytes": checkpoints.memory_gigabytes("cpu")}]
    for index in range(torch.cuda.device_count()):
        name = f"cuda:{index} ({torch.cuda.get_device_name(index)})"
        devices.append({"name": name, "gigabytes": checkpoints.memory_gigabytes(f"cuda:{index}")})
    if torch.backends.mps.is_available():
        devices.append({"name": "mps", "gigabytes": checkpoints.memory_gigabytes("mps")})
    models = [
        {
            "name": "toy",
            "here": (checkpoints.toy_folder() / "model.safetensors").is_file(),
            "note": "bundled; coloured shapes only",
        }
    ]
    for known in checkpoints.KNOWN:
        here = checkpoints.cached(known.repository) is not None
        note = (
            "in the cache, works offline"
            if here
            else f"{known.gigabytes} GB to download, wants {known.memory_gigabytes} GB"
        )
        models.append({"name": known.repository, "here": here, "note": note})
    for repository in checkpoints.EMBEDDERS:
        here = checkpoints.cached(repository) is not None
        models.append({"name": repository, "here": here, "note": "finds moments for a question"})
    advice = []
    if not any(m["here"] for m in models if m["name"] not in ("toy", *checkpoints.EMBEDDERS)):
        advice.append(
            f"no pretrained model is here: `hf download {checkpoints.KNOWN[0].repository}` fetches the smallest"
        )
    if not any(m["here"] for m in models if m["name"] in checkpoints.EMBEDDERS):
        advice.append(
            f"no image-text encoder is here, recall goes by time alone: `hf download {checkpoints.EMBEDDERS[0]}`"
        )
    folder = default_folder()
    there = folder if folder.exists() else next(p for p in folder.parents if p.exists())
    note = (
        ("exists" if folder.exists() else "will be made")
        if os.access(there, os.W_OK)
        else "NOT WRITABLE; set STREAMVID_MEMORY"
    )
    return {
        "streamvid": _version("streamvid"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "cores": os.cpu_count(),
        "packages": packages,
        "devices": devices,
        "models": models,
        "memory": {"folder": str(folder), "note": note},
        "advice": advice,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
