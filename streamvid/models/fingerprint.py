"""What makes one checkpoint differ from another."""

from __future__ import annotations

import hashlib
from pathlib import Path

WHOLE_BYTES = 64 << 20
"""Files up to this size are hashed whole."""

BLOCKS = 512
BLOCK_BYTES = 16 << 10


def fingerprint(folder: Path) -> str:
    """Identifies a checkpoint by configuration and weights.

    Small weight files are hashed whole; of a large one its size, its first and last mebibyte, which hold
    the header with every tensor's name, shape and place, and 512 blocks of 16 KiB evenly between: a model
    that was trained on differs in whole matrices, each far larger than the distance of two blocks.
    """
    digest = hashlib.sha256()
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    for path in [*(folder / n for n in names), *sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.bin"))]:
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            if size <= WHOLE_BYTES:
                digest.update(file.read())
            else:
                digest.update(file.read(1 << 20))
                for block in range(1, BLOCKS + 1):
                    file.seek(size * block // (BLOCKS + 1))
                    digest.update(file.read(BLOCK_BYTES))
                file.seek(-(1 << 20), 2)
                digest.update(file.read())
    return digest.hexdigest()[:32]
