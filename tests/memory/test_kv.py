"""Keys and values on disk: as they were, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamvid.memory.kv import KeptKv, intact_kv, load_kv, save_kv, size_of

BLOCKS = [(3, "aa"), (7, "bb")]


def kept(dtype: torch.dtype = torch.bfloat16) -> KeptKv:
    torch.manual_seed(3)
    return KeptKv(BLOCKS, [(torch.randn(1, 2, 7, 4).to(dtype), torch.randn(1, 2, 7, 4).to(dtype)) for _ in range(3)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "kv" / "a.safetensors"
    save_kv(path, kept(dtype), digest="d")
    back = load_kv(path, digest="d")
    assert back is not None and back.blocks == BLOCKS
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype
        for pair, other in zip(back.layers, kept(dtype).layers, strict=True)
        for a, b in zip(pair, other, strict=True)
    )
    assert size_of(back.layers) == 3 * 2 * 56 * dtype.itemsize
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_another_key_has_nothing_there(tmp_path: Path) -> None:
    path = tmp_path / "kv" / "a.safetensors"
    assert load_kv(path, digest="d") is None
    save_kv(path, kept(), digest="d")
    assert load_kv(path, digest="e") is None


def test_any_flipped_byte_and_any_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "kv" / "a.safetensors"
    save_kv(path, kept(), digest="d")
    whole = path.read_bytes()
    assert intact_kv(path, digest="d")
    for place in range(len(whole)):
        for bits in (0x01, 0x0F, 0x20):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bits]) + whole[place + 1 :])
            assert load_kv(path, digest="d") is None, (place, bits)
        assert not intact_kv(path, digest="d")
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        assert load_kv(path, digest="d") is None


def test_a_disk_that_is_full_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kv" / "a.safetensors"
    save_kv(path, kept(), digest="d")
    whole = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_kv(path, kept(torch.float32), digest="d")
    assert path.read_bytes() == whole and [p.name for p in path.parent.iterdir()] == ["a.safetensors"]
