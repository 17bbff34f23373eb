"""What makes one checkpoint differ from another."""

from __future__ import annotations

import hashlib
from pathlib import Path


def fingerprint(folder: Path) -> str:
    """Identifies a checkpoint by configuration and weights.

    Small weight files are hashed whole; of a large one its size and its first and last mebibyte,
    which hold the header with every tensor's name, shape and place.
    """
    digest = hashlib.sha256()
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    for path in [*(folder / n for n in names), *sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.bin"))]:
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            if size <= 64 << 20:
                digest.update(file.read())
            else:
                digest.update(file.read(1 << 20))
                file.seek(-(1 << 20), 2)
                digest.update(file.read())
    return digest.hexdigest()[:32]
