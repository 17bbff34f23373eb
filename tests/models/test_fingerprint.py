"""Two checkpoints are one only if nothing tells them apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamvid.models import fingerprint as module
from streamvid.models.fingerprint import fingerprint

SIZE = 3 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "WHOLE_BYTES", 1 << 20)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(SIZE))
    return tmp_path


def test_names_and_every_file_count(folder: Path) -> None:
    seen = {fingerprint(folder)}
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "adapter.safetensors", "old.bin"):
        (folder / name).write_text(name)
        seen.add(fingerprint(folder))
    assert len(seen) == 6
    (folder / "README.md").write_text("other words")
    assert fingerprint(folder) in seen


@pytest.mark.parametrize("place", [0, 1 << 20, SIZE // 2, SIZE - 1])
def test_a_matrix_that_was_trained_on_is_another_model(folder: Path, place: int) -> None:
    before = fingerprint(folder)
    matrix = 32 << 10  # of a file of 4 GB it would be 40 MB
    content = bytearray(SIZE)
    for byte in range(max(0, place - matrix), min(SIZE, place + matrix)):
        content[byte] = 1
    (folder / "model.safetensors").write_bytes(content)
    assert fingerprint(folder) != before


def test_a_large_file_is_not_read_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    read = 0
    real = Path.open

    def counting(self: Path, mode: str = "r") -> object:
        file = real(self, mode)
        take = file.read

        class Counted:
            def __enter__(self) -> Counted:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def seek(self, *where: int) -> int:
                return file.seek(*where)

            def read(self, count: int = -1) -> bytes:
                nonlocal read
                data = take(count)
                read += len(data)
                return bytes(data)

        return Counted()

    monkeypatch.setattr(Path, "open", counting)
    fingerprint(folder)
    assert read <= (2 << 20) + module.BLOCKS * 64 + 100
