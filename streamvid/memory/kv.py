"""Keys and values of a language model on disk, beside the tokens they were computed from.

One file a source: the latest prompt's.  It is only a shortcut: whatever is not exactly as written, or of
another key, is as good as absent.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from streamvid.memory.segments import sync_folder

FORMAT = 2
"""2: checksums cover dtypes and shapes."""


@dataclass(frozen=True, slots=True)
class KeptKv:
    """What a language model computed for the beginning of a prompt."""

    blocks: list[tuple[int, str]]
    """Where each frame of the prompt ends, and the digest of everything up to there."""

    layers: list[tuple[Tensor, Tensor]]
    """Keys and values of each layer, (1, heads, L, width)."""


def save_kv(path: Path, kept: KeptKv, *, digest: str) -> None:
    """Write keys and values in place of older ones, all or nothing.

    Args:
        path: the file; its folder is made if missing.
        kept: what to write.
        digest: of the memory key they belong to.

    Raises:
        OSError: if the disk does not take it; the older file is then still there.
    """
    tensors = {
        f"{name}{index}": tensor.detach().cpu().contiguous()
        for index, pair in enumerate(kept.layers)
        for name, tensor in zip("kv", pair, strict=True)
    }
    told = {
        "format": FORMAT,
        "key": digest,
        "blocks": kept.blocks,
        "crc": {name: _crc(tensor) for name, tensor in tensors.items()},
    }
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        text = json.dumps(told)
        save_file(tensors, part, metadata={"streamvid": text, "crc": str(zlib.crc32(text.encode()))})
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def load_kv(path: Path, *, digest: str, device: str | torch.device = "cpu") -> KeptKv | None:
    """What was kept for a memory key; None if there is nothing, or anything about it is not as written."""
    tensors: dict[str, Tensor] = {}
    try:
        told = _check(path, digest=digest, tensors=tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    count = len(tensors) // 2
    layers = [(tensors[f"k{index}"].to(device), tensors[f"v{index}"].to(device)) for index in range(count)]
    return KeptKv([(int(end), str(text)) for end, text in told["blocks"]], layers)


def intact_kv(path: Path, *, digest: str) -> bool:
    """Whether every byte of a file is as written and for this memory key; holds one tensor in memory.

    One that an older streamvid wrote is not: it is as good as absent.
    """
    try:
        _check(path, digest=digest)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return False
    return True


def _check(path: Path, *, digest: str, tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """What a file says of itself; raises if one byte of it is not as written.

    Args:
        path: the file.
        digest: of the memory key it must belong to.
        tensors: takes what the file holds; None: it is only looked at.
    """
    with open(path, "rb") as plain:
        length = int.from_bytes(plain.read(8), "little")
        if length > os.fstat(plain.fileno()).st_size:
            raise ValueError("it is cut")
        text = plain.read(length).decode("ascii")
    header = json.loads(text)
    # As safetensors writes it, so that no byte of it can say the same in another way.
    written = json.dumps(header, separators=(",", ":"))
    if text != written + " " * (-len(written) % 8):
        raise ValueError("its header is not as written")
    with safe_open(path, framework="pt", device="cpu") as file:
        metadata = file.metadata() or {}
        about = metadata["streamvid"]
        if metadata != {"streamvid": about, "crc": str(zlib.crc32(about.encode()))}:
            raise ValueError("what it says of itself is not as written")
        told: dict[str, Any] = json.loads(about)
        if told["format"] != FORMAT or told["key"] != digest or header.keys() != {"__metadata__", *told["crc"]}:
            raise ValueError("it is of another format or key")
        for name, crc in told["crc"].items():
            tensor = file.get_tensor(name)
            if _crc(tensor) != crc:
                raise ValueError(f"{name} is not as written")
            if tensors is not None:
                tensors[name] = tensor
    return told


def size_of(layers: Sequence[tuple[Tensor, Tensor]]) -> int:
    """Bytes of keys and values."""
    return sum(tensor.numel() * tensor.element_size() for pair in layers for tensor in pair)


def folder_bytes(folder: Path) -> int:
    """Bytes of all that is kept in a folder; 0 if there is none."""
    try:
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    except FileNotFoundError:
        return 0


def _crc(tensor: Tensor) -> int:
    about = f"{tensor.dtype} {tuple(tensor.shape)}"
    return zlib.crc32(tensor.view(torch.uint8).reshape(-1).numpy().data, zlib.crc32(about.encode("ascii")))
