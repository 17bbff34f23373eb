"""Finds checkpoints: a folder, the bundled toy model, the local cache, or a download that is announced first."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from streamvid import errors
from streamvid.models.adapter import Adapter

if TYPE_CHECKING:
    from streamvid.models.embedder import Embedder

TOY = "toy"
ADAPTERS = {"qwen3_vl": ("streamvid.models.qwen_vl", "Qwen3VL")}
"""Module and class by ``model_type``; imported when a checkpoint of the family is loaded, which takes seconds."""

TOY_LINE = (
    "NOTE: no pretrained model could be loaded, so the bundled TOY model answers; "
    "it knows coloured shapes and nothing else, do not trust it on real video"
)


@dataclass(frozen=True, slots=True)
class Known:
    """A checkpoint that is known to work."""

    repository: str
    gigabytes: float
    """Size of the download."""

    memory_gigabytes: float
    """Memory it wants in bfloat16 with a few thousand visual tokens."""


KNOWN = (
    Known("Qwen/Qwen3-VL-2B-Instruct", 4.3, 7),
    Known("Qwen/Qwen3-VL-4B-Instruct", 8.9, 13),
    Known("Qwen/Qwen3-VL-8B-Instruct", 17.5, 24),
    Known("Qwen/Qwen3-VL-32B-Instruct", 66.7, 80),
)
"""By rising size; ``auto`` takes the largest that fits."""

EMBEDDERS = (
    "google/siglip2-base-patch16-256",
    "google/siglip-base-patch16-224",
    "openai/clip-vit-base-patch32",
)
"""Dual encoders looked for in the cache, best first."""


@dataclass(frozen=True, slots=True)
class Found:
    """Where a model is and how it came to be chosen."""

    name: str
    folder: Path
    notes: tuple[str, ...] = ()


def toy_folder() -> Path:
    """The bundled toy checkpoint."""
    return Path(__file__).parent.parent / "toy" / "checkpoint"


def toy_encoder_folder() -> Path:
    """The bundled toy dual encoder."""
    return Path(__file__).parent.parent / "toy" / "encoder"


def pick_device(device: str) -> str:
    """The device to run on; "auto" takes a GPU where there is one.

    Raises:
        SettingsError: if the device is unknown or not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise errors.SettingsError(f"there is no device {device!r}; known: auto, cpu, cuda, cuda:0, mps") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind, False):
        raise errors.SettingsError(f"device {device!r} was asked for and is not here; `streamvid doctor` lists what is")
    return device


def memory_gigabytes(device: str) -> float:
    """Memory of the device that a model may fill."""
    if device.startswith("cuda"):
        return float(torch.cuda.get_device_properties(torch.device(device)).total_memory / 1e9)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError, AttributeError):
        return 8.0


def cached(repository: str) -> Path | None:
    """The folder of a repository in the local cache, None if it is not (wholly) there.  Never uses the network."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
    except Exception:  # noqa: BLE001 - the hub's client has many ways to say "not there"
        return None
    whole = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    return folder if whole else None


def find(model: str, *, device: str, say: Callable[[str], None], toy_allowed: bool = True) -> Found:
    """Where the weights for ``--model`` are, downloading if there is no other way.

    Args:
        model: "auto", "toy", a folder, or a repository name.
        device: where it will run; decides what "auto" takes.
        say: told before anything large happens.
        toy_allowed: whether the toy model may stand in when nothing else can be loaded.

    Raises:
        SettingsError: if there is no such model.
        UnsupportedError: if none can be loaded and the toy model is not allowed.
    """
    if model == TOY:
        return Found(TOY, _whole(toy_folder()))
    if model != "auto":
        return _named(model, say)
    fitting = [k for k in KNOWN if k.memory_gigabytes <= memory_gigabytes(device)]
    for choice in reversed(fitting):
        folder = cached(choice.repository)
        if folder is not None:
            return Found(choice.repository, folder)
    reason = f"no known model fits into {memory_gigabytes(device):.0f} GB"
    if fitting:
        # on a processor the smallest is the only one that answers in reasonable time
        choice = fitting[-1] if device != "cpu" else fitting[0]
        try:
            return Found(choice.repository, _download(choice.repository, f"{choice.gigabytes} GB", say))
        except errors.UnsupportedError as error:
            reason = str(error)
    if not toy_allowed:
        raise errors.UnsupportedError(f"{reason}; --no-toy forbids the toy model; give --model FOLDER")
    return Found(TOY, _whole(toy_folder()), (f"{TOY_LINE} ({reason})",))


def _named(model: str, say: Callable[[str], None]) -> Found:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return Found(folder.resolve().name, _whole(folder))
    if "/" in model and not model.startswith((".", "/", "~")) and model.count("/") == 1:
        there = cached(model)
        if there is not None:
            return Found(model, there)
        size = next((f"{k.gigabytes} GB" for k in KNOWN if k.repository == model), "of unknown size")
        return Found(model, _download(model, size, say))
    names = [TOY, "auto", *(k.repository for k in KNOWN)]
    raise errors.SettingsError(f"there is no model {model!r}: not a folder, not a name; {errors.near(model, names)}")


def _whole(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise errors.SettingsError(
            f"{folder} holds no config.json; a checkpoint folder has config, weights and tokenizer"
        )
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise errors.SettingsError(f"{folder} holds no weights (*.safetensors); was the download finished?")
    return folder


def _download(repository: str, size: str, say: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "TRUE", "on", "ON", "yes", "YES"):
        raise errors.UnsupportedError(f"{repository} is not in the local cache and HF_HUB_OFFLINE forbids to fetch it")
    say(f"downloading {repository}, {size}; it is kept, the next start is offline")
    disable_progress_bars()
    try:
        return Path(snapshot_download(repository, etag_timeout=5))
    except Exception as error:  # noqa: BLE001 - the hub's client raises whatever its transport raises
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise errors.UnsupportedError(
            f"{repository} is not in the local cache and could not be fetched: {reason}"
        ) from None


def load(found: Found, *, device: str, dtype: str) -> Adapter:
    """Load a found checkpoint through the adapter of its family.

    Raises:
        UnsupportedError: if no adapter knows the family, or the weights cannot be read.
    """
    kind = str(json.loads((found.folder / "config.json").read_text()).get("model_type", "unknown"))
    if kind not in ADAPTERS:
        raise errors.UnsupportedError(
            f"{found.name} is of family {kind!r}, which has no adapter; families that have: {', '.join(ADAPTERS)}"
        )
    module, name = ADAPTERS[kind]
    adapter: type[Adapter] = getattr(importlib.import_module(module), name)
    try:
        with _without_bars():
            return adapter.load(found.folder, name=found.name, device=device, dtype=dtype)
    except (OSError, RuntimeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise errors.UnsupportedError(f"{found.name} could not be loaded: {first}") from error


def find_embedder(name: str, *, model: str, device: str) -> Embedder | None:
    """The dual encoder for retrieval.

    Args:
        name: "auto", "none", "toy", a folder or a cached repository.
        model: the model it serves; the toy model goes with the toy encoder.
        device: where it runs.

    Raises:
        SettingsError: if a named one is not there.
    """
    if name == "none":
        return None
    from streamvid.models.embedder import DualEncoder  # with the model libraries behind it: seconds to import

    if name == TOY or (name == "auto" and model == TOY):
        name, folder = "toy-encoder", _whole(toy_encoder_folder())
    elif name != "auto":
        found = Path(name).expanduser() if Path(name).expanduser().is_dir() else cached(name)
        if found is None:
            raise errors.SettingsError(
                f"there is no embedder {name!r} in the local cache; {errors.near(name, EMBEDDERS)}"
            )
        folder = found
    else:
        there = [(repository, cached(repository)) for repository in EMBEDDERS]
        here = [(repository, path) for repository, path in there if path is not None]
        if not here:
            return None
        name, folder = here[0]
    with _without_bars():
        return DualEncoder.load(folder, name=name, device=device)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Loading a small model in a blink needs no progress bar on stderr."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
