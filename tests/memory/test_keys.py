from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest

from streamvid.errors import SourceError
from streamvid.memory.keys import MemoryKey, content_digest
from tests.memory.spans import KEY

CHANGES = {
    "content": {"content": "cd" * 32},
    "fps": {"sampling": {**KEY.sampling, "fps": 2}},
    "max_frames": {"sampling": {**KEY.sampling, "max_frames": 64}},
    "from": {"sampling": {**KEY.sampling, "from": Fraction(1, 3)}},
    "to": {"sampling": {**KEY.sampling, "to": Fraction(1, 3)}},
    "model": {"model": "toy 2"},
    "processor": {"processor": "toy pixels 2"},
    "method": {"methods": [{"method": "rlt", "threshold": 0.1}, {"method": "visionzip", "keep_ratio": 0.25}]},
    "method setting": {"methods": [{"method": "rlt", "threshold": 0.2}, {"method": "fastvid", "keep_ratio": 0.25}]},
    "method order": {"methods": list(reversed(KEY.methods))},
    "no methods": {"methods": []},
    "embedder": {"embedder": "toy embedder 2"},
    "format": {"format": 2},
}


def test_any_changed_ingredient_is_another_digest() -> None:
    digests = {name: replace(KEY, **change).digest for name, change in CHANGES.items()}
    assert len({KEY.digest, *digests.values()}) == len(CHANGES) + 1


def test_ingredients_do_not_run_into_each_other() -> None:
    assert replace(KEY, model="ab", processor="c").digest != replace(KEY, model="a", processor="bc").digest


def test_equal_ingredients_are_one_digest_however_they_are_written() -> None:
    shuffled = dict(reversed(KEY.sampling.items())) | {"fps": 1.0}
    assert replace(KEY, sampling=shuffled).digest == KEY.digest
    assert KEY.digest.startswith(KEY.short) and len(KEY.short) == 12


def test_json_round_trip() -> None:
    key = replace(KEY, sampling={"fps": Fraction(30000, 1001), "name": "Straße"})
    assert MemoryKey.from_json(key.to_json()) == key


def test_changing_the_settings_afterwards_does_not_reach_the_key() -> None:
    settings = {"fps": 1}
    key = replace(KEY, sampling=settings)
    before = key.digest
    settings["fps"] = 2
    assert key.digest == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"x"])
def test_values_without_one_spelling_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="sampling.fps must be"):
        replace(KEY, sampling={"fps": value})


def test_content_digest_is_over_every_byte(tmp_path) -> None:
    data = bytearray(3 << 20)
    path = tmp_path / "v"
    path.write_bytes(data)
    before = content_digest(path)
    data[-1] = 1
    path.write_bytes(data)
    assert content_digest(path) != before
    with pytest.raises(SourceError, match="No such file"):
        content_digest(tmp_path / "missing")
