from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamvid.budget import Limits
from streamvid.errors import BankError, SettingsError
from streamvid.memory import bounds
from streamvid.memory.bank import Bank
from streamvid.memory.bounds import fitting_tokens
from streamvid.memory.catalog import Catalog
from streamvid.memory.keys import MemoryKey
from streamvid.memory.merging import merged_tokens
from streamvid.memory.records import SpanRecord
from streamvid.memory.segments import SegmentWriter
from streamvid.memory.writer import Writer
from streamvid.temporal.methods.memory.merge_time import MergeTime
from streamvid.tokens import VideoTokens
from tests.memory.spans import KEY, append, assert_same, source_key, span_tokens, store

MB = 1 << 20
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of spans are appended here and no power is cut: what is written need not reach the disk."""
    real = Catalog.__init__

    def opened(self: Catalog, path: Path, *, read_only: bool = False) -> None:
        real(self, path, read_only=read_only)
        self._db.execute("PRAGMA synchronous = OFF")

    monkeypatch.setattr(Catalog, "__init__", opened)
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def small(number: int, *, tokens: int = 8) -> VideoTokens:
    """A span of one second: two frames of a 2 x 2 grid, every token as large as one."""
    random = torch.Generator().manual_seed(number)
    cell = torch.arange(tokens)
    return VideoTokens(
        features=torch.randn(tokens, 16, generator=random),
        grid=(2, 2, 2),
        position=torch.stack([cell // 4, cell % 4 // 2, cell % 2], dim=1),
        pts_seconds=number + (cell // 4).double() / 2,
        duration_seconds=torch.full((tokens,), 0.5, dtype=torch.float64),
        size=torch.ones(tokens),
        score=torch.rand(tokens, generator=random),
    )


def put(writer: Writer, number: int, *, tokens: int = 8) -> None:
    key = torch.randn(1, 8, generator=torch.Generator().manual_seed(number))
    writer.append(small(number, tokens=tokens), start=Fraction(number), stop=Fraction(number + 1), keys=key)


def fill(bank: Bank, key: MemoryKey, numbers: range, *, done: bool = True) -> int:
    with bank.writer(key, path=f"/v/{key.content}", name=key.content[:6]) as writer:
        for number in numbers:
            put(writer, number)
        if done:
            writer.finish({})
    return id_of(bank, key)


def id_of(bank: Bank, key: MemoryKey) -> int:
    source = bank.find(key)
    assert source is not None
    return source.id


def on_disk(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def check_whole(bank: Bank, source_id: int, *, seconds: int, first: int = 0) -> list[SpanRecord]:
    """Spans and what was expired cover the source without holes; every token is readable and accounted for."""
    source = next(s for s in bank.sources() if s.id == source_id)
    spans = bank.spans(source_id)
    gone = bank.expired(source_id)
    assert [s.start for s in spans[1:]] == [s.stop for s in spans[:-1]]
    assert spans[-1].stop == seconds and spans[0].start == (gone[-1].stop if gone else first)
    assert (source.spans, source.tokens) == (len(spans), sum(s.tokens for s in spans))
    for span in spans:
        [tokens] = bank.read([(span, span.tokens)])
        assert float(tokens.size.sum()) == 8 * float(span.stop - span.start), span
        assert float(tokens.pts_seconds.min()) == span.start
        assert float((tokens.pts_seconds + tokens.duration_seconds).max()) == span.stop
    files = {p.name: p.stat().st_size for p in (bank.folder / source.folder).glob("*.seg")}
    assert source.num_bytes == sum(files.values())
    assert set(files) == {s.file for s in spans}
    ids, view = bank.view(source_id)
    assert ids.tolist() == [span.id for span in spans]
    keys = view.keys[torch.arange(len(ids))]
    assert bool(((keys.norm(dim=2) - 1).abs() < 1e-5).any(1).all()) and keys.shape[1] <= 4
    return spans


@pytest.mark.parametrize(
    "limits",
    [
        {"disk_bytes": 0},
        {"source_bytes": 0},
        {"source_tokens": 0},
        {"ram_bytes": -1},
        {"vram_bytes": 0},
        {"keep_seconds": 0},
        {"keep_seconds": math.nan},
        {"keep_seconds": math.inf},
    ],
)
def test_limits_out_of_range_are_refused_in_one_line(limits: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match="leave it out") as caught:
        Limits(**limits)  # type: ignore[arg-type]
    assert str(next(iter(limits.values()))) in str(caught.value)


def test_answers_get_as_many_tokens_as_memory_holds() -> None:
    limits = Limits(answer_tokens=1000, ram_bytes=10_000, vram_bytes=500)
    assert fitting_tokens(limits, 10, 4_000) == 600
    assert fitting_tokens(limits, 1, 4_000) == 1000
    assert fitting_tokens(limits, 10, 100, device="cuda:0") == 40
    assert fitting_tokens(Limits(), 10**9, 10**12) == 8192
    with pytest.raises(SettingsError, match="no room for a token of 10 bytes"):
        fitting_tokens(limits, 10, 9_991)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 40),
    st.integers(0, 40),
)
def test_merging_halves_tokens_and_loses_no_size(
    seed: int, frames: int, height: int, width: int, left: int, right: int
) -> None:
    random = torch.Generator().manual_seed(seed)

    def part(first: float, count: int) -> VideoTokens:
        count = min(count, frames * height * width)
        cell = torch.randperm(frames * height * width, generator=random)[:count].sort().values
        frame = cell // (height * width)
        return VideoTokens(
            features=torch.randn(count, 3, generator=random),
            layers=(torch.randn(count, 3, generator=random),),
            grid=(frames, height, width),
            position=torch.stack([frame, cell % (height * width) // width, cell % width], dim=1),
            pts_seconds=first + frame.double(),
            duration_seconds=torch.ones(count, dtype=torch.float64),
            size=torch.randint(1, 9, (count,), generator=random).float(),
            score=torch.rand(count, generator=random),
        )

    parts = [part(0, left), part(frames, right)]
    before = VideoTokens.cat(parts)
    out = merged_tokens(parts, MergeTime())
    assert len(out) == (len(before) + 1) // 2 or len(out) <= len(before) // 2
    assert len(out) >= (len(before) > 0)
    torch.testing.assert_close(out.size.sum(), before.size.sum())
    if not len(before):
        return
    torch.testing.assert_close(
        (out.features * out.size[:, None]).sum(0), (before.features * before.size[:, None]).sum(0)
    )
    torch.testing.assert_close(
        (out.layers[0] * out.size[:, None]).sum(0), (before.layers[0] * before.size[:, None]).sum(0)
    )
    assert out.pts_seconds.min() == before.pts_seconds.min()
    stops = [t.pts_seconds + t.duration_seconds for t in (out, before)]
    assert stops[0].max() == stops[1].max()
    assert out.grid[0] <= frames and int(out.position[:, 0].max()) < out.grid[0]
    place = (out.position[:, 0] * height + out.position[:, 1]) * width + out.position[:, 2]
    assert bool((place[1:] >= place[:-1]).all())
    one_time = {(int(f), float(t)) for f, t in zip(out.position[:, 0], out.pts_seconds, strict=True)}
    assert len(one_time) == len({f for f, _ in one_time}), "tokens of one frame share a time"


def test_memory_fades_with_the_logarithm_of_age(tmp_path: Path) -> None:
    """Beyond the finest level, each doubling of age holds about as many spans; nothing is lost."""
    seconds = 1300
    with Bank.open(tmp_path, limits=Limits(source_tokens=640)) as bank:
        source_id = fill(bank, KEY, range(seconds))
        spans = check_whole(bank, source_id, seconds=seconds)
        assert not bank.expired(source_id)
        levels = [s.level for s in spans]
        assert levels == sorted(levels, reverse=True)
        assert all(s.stop - s.start == 2**s.level for s in spans)
        counts = Counter(levels)
        assert max(levels) >= 5
        full = [counts[level] for level in range(max(levels) - 1)]
        assert max(full) <= 1.5 * min(full), counts
        ages = [math.log2(seconds - float(s.start)) for s in spans]
        whole = range(math.ceil(math.log2(counts[0])) + 1, math.floor(math.log2(seconds)))
        octaves = Counter(math.floor(age) for age in ages)
        per_octave = [octaves[n] for n in whole]
        assert len(per_octave) >= 3 and max(per_octave) <= 1.7 * min(per_octave), octaves
        assert 0.9 * 640 < sum(s.tokens for s in spans) <= 640


def test_disk_is_never_above_the_limit(tmp_path: Path) -> None:
    limit = 3 * MB
    with Bank.open(tmp_path, limits=Limits(disk_bytes=limit)) as bank:
        with bank.writer(KEY, path="a", name="a") as writer:
            most = 0
            for number in range(900):
                append(writer, number)
                if number % 10 == 0:
                    most = max(most, on_disk(tmp_path))
            assert 0.6 * limit < most <= limit
        spans = bank.spans(id_of(bank, KEY))
        assert [s.start for s in spans[1:]] == [s.stop for s in spans[:-1]]
        assert spans[0].start == 0 and not bank.expired(spans[0].source_id)
        assert 100 < len(spans) < 600 and all(s.tokens >= 50 for s in spans)


def test_source_bytes_hold_one_source_and_leave_the_other(tmp_path: Path) -> None:
    with Bank.open(tmp_path) as bank:
        other = fill(bank, source_key("other"), range(200))
        untouched = bank.spans(other)
    with Bank.open(tmp_path, limits=Limits(source_bytes=200_000)) as bank:
        source_id = fill(bank, KEY, range(500))
        check_whole(bank, source_id, seconds=500)
        source = bank.source(source_id)
        assert 100_000 < source.num_bytes <= 200_000
        assert bank.spans(other) == untouched


def test_what_cannot_be_merged_further_is_expired_and_told(tmp_path: Path) -> None:
    """Room for 40 spans: eight of each level stay, so the farthest past goes; once per reason in one row."""
    with Bank.open(tmp_path, limits=Limits(source_tokens=320)) as bank:
        source_id = fill(bank, KEY, range(700))
        [gone] = bank.expired(source_id)
        spans = check_whole(bank, source_id, seconds=700)
        assert gone.reason == "space" and gone.start == 0 and gone.stop == spans[0].start > 0
        assert gone.spans > 0 and gone.tokens == 8 * gone.spans
        assert min(Counter(s.level for s in spans).values()) >= 1 and len(spans) <= 40


def test_age_limit_expires_by_time_in_the_video(tmp_path: Path) -> None:
    with Bank.open(tmp_path, limits=Limits(keep_seconds=100)) as bank:
        source_id = fill(bank, KEY, range(500))
        spans = check_whole(bank, source_id, seconds=500)
        assert 100 <= 500 - spans[0].start <= 102
        [gone] = bank.expired(source_id)
        assert (gone.reason, gone.spans, gone.tokens) == ("age", 500 - len(spans), 8 * (500 - len(spans)))
        assert bank.source(source_id).num_bytes == on_disk(tmp_path / bank.source(source_id).folder)


def test_pinned_sources_are_never_touched_and_then_the_writer_is_told(tmp_path: Path) -> None:
    with Bank.open(tmp_path) as bank:
        kept = fill(bank, source_key("kept"), range(300))
        bank.pin(kept)
        before = bank.spans(kept)
        limit = bank.usage() + MB
    with Bank.open(tmp_path, limits=Limits(disk_bytes=limit)) as bank:
        with bank.writer(KEY, path="a", name="a.mp4") as writer:
            for number in range(700):
                put(writer, number)
            assert bank.spans(kept) == before
            bank.pin(writer.source_id)
            with pytest.raises(BankError, match=f"may hold {limit} bytes, holds .*--keep") as caught:
                for number in range(700, 2000):
                    put(writer, number)
            assert "\n" not in str(caught.value) and "raise the limit" in str(caught.value)
            stop = writer.stop
        assert bank.spans(kept) == before and stop is not None
        check_whole(bank, id_of(bank, KEY), seconds=int(stop))


@pytest.mark.parametrize("limits", [Limits(source_tokens=400), Limits(source_bytes=60_000)])
def test_a_kept_source_meets_its_own_limit_in_one_line(tmp_path: Path, limits: Limits) -> None:
    with Bank.open(tmp_path, limits=limits) as bank, bank.writer(KEY, path="a", name="a.mp4") as writer:
        put(writer, 0)
        bank.pin(writer.source_id)
        with pytest.raises(BankError, match="a.mp4 may .* kept whole .--keep.; raise the limit"):
            for number in range(1, 400):
                put(writer, number)
        assert {s.level for s in bank.spans(writer.source_id)} == {0}


def test_a_span_that_is_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    with Bank.open(tmp_path, limits=Limits(source_tokens=50)) as bank, bank.writer(KEY, path="a", name="a") as writer:
        with pytest.raises(BankError, match="may remember 50 tokens and a single span has 100"):
            append(writer, 0)
        assert bank.spans(writer.source_id) == []


def test_the_source_with_most_bytes_an_hour_gives_way_first(tmp_path: Path) -> None:
    """Two finished sources: a dense one of 600 spans in 600 s, a sparse one whose spans last 60 s each."""
    sparse, dense = source_key("sparse"), source_key("dense")
    with Bank.open(tmp_path) as bank:
        with bank.writer(sparse, path="s", name="s") as writer:
            for number in range(200):
                writer.append(
                    small(number), start=Fraction(60 * number), stop=Fraction(60 * number + 60), keys=torch.ones(1, 8)
                )
            writer.finish({})
        dense_id = fill(bank, dense, range(600))
        limit = bank.usage() + 3 * MB // 4
        untouched = bank.spans(id_of(bank, sparse))
    with Bank.open(tmp_path, limits=Limits(disk_bytes=limit)) as bank:
        with bank.writer(KEY, path="n", name="n") as fresh:
            for number in range(150):
                fresh.append(
                    small(number), start=Fraction(60 * number), stop=Fraction(60 * number + 60), keys=torch.ones(1, 8)
                )
        assert bank.spans(id_of(bank, sparse)) == untouched
        assert {s.level for s in bank.spans(id_of(bank, KEY))} == {0}
        assert len(check_whole(bank, dense_id, seconds=600)) < 550
        assert on_disk(tmp_path) <= limit


def test_writers_in_two_banks_share_one_limit(tmp_path: Path) -> None:
    limits = Limits(disk_bytes=2 * MB)
    with Bank.open(tmp_path, limits=limits) as one, Bank.open(tmp_path, limits=limits) as two:
        with one.writer(KEY, path="a", name="a") as a, two.writer(source_key("b"), path="b", name="b") as b:
            for number in range(600):
                put(a, number)
                put(b, number)
                if number % 50 == 0:
                    assert on_disk(tmp_path) <= 2 * MB
        for key in (KEY, source_key("b")):
            spans = check_whole(one, id_of(one, key), seconds=600)
            assert len(spans) > 60


def test_dropped_before_any_span_is_merged_what_can_be_made_anew(tmp_path: Path) -> None:
    with Bank.open(tmp_path) as bank:
        source_id = fill(bank, KEY, range(20), done=False)
        (tmp_path / "kv").mkdir()
        (tmp_path / "kv" / "x.safetensors").write_bytes(bytes(MB))
        limit = bank.usage() + MB
    with Bank.open(tmp_path, limits=Limits(disk_bytes=limit)) as bank, bank.writer(KEY, path="a", name="a") as writer:
        for number in range(20, 3000):
            put(writer, number)
            if not any((tmp_path / "kv").iterdir()):
                break
        assert 100 < number < 2999
        assert {s.level for s in bank.spans(source_id)} == {0}


STEPS = ("written", "in_transaction", "committed", "moved", "deleted")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crash(folder: Path, step: str, after: int, numbers: range) -> None:
    """Append under a limit and die at a step of making room."""
    real_merge, real_move, real_bytes = Catalog.merge_spans, Catalog.move_spans, Catalog.set_bytes
    left = after

    def counted() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    def merge(self: Catalog, *args: object, **named: object) -> None:
        if step == "written" and counted():
            die()
        if step == "in_transaction" and counted():
            self._db.set_trace_callback(lambda sql: die() if sql == "COMMIT" else None)
        real_merge(self, *args, **named)  # type: ignore[arg-type]
        if step == "committed" and counted():
            die()

    def move(self: Catalog, *args: object, **named: object) -> None:
        real_move(self, *args, **named)  # type: ignore[arg-type]
        if step == "moved" and counted():
            die()

    def set_bytes(self: Catalog, *args: object) -> None:
        if step == "deleted" and counted():
            die()
        real_bytes(self, *args)  # type: ignore[arg-type]

    Catalog.merge_spans, Catalog.move_spans, Catalog.set_bytes = merge, move, set_bytes  # type: ignore[assignment, method-assign]
    with Bank.open(folder, limits=Limits(source_bytes=100_000)) as bank:
        fill(bank, KEY, numbers, done=False)


def crash_all(base: Path) -> None:
    """Every way to die, each in a process of its own; prints how it ended."""
    torch.set_num_threads(1)  # threads do not survive a fork
    for step in STEPS:
        for after in (0, 3):
            child = os.fork()
            if not child:
                try:
                    crash(base / f"{step}-{after}", step, after, range(250))
                finally:
                    os._exit(1)
            print(step, after, os.WIFSIGNALED(os.waitpid(child, 0)[1]), flush=True)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("crashed")
    code = f"from tests.memory.test_bounds import *; crash_all(Path({str(base)!r}))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=150, check=True
    )
    assert run.stdout.count("True") == 2 * len(STEPS), run.stdout
    return base


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("after", [0, 3])
def test_killed_while_making_room_memory_is_whole_and_goes_on(crashed: Path, step: str, after: int) -> None:
    folder = crashed / f"{step}-{after}"
    with Bank.open(folder, limits=Limits(source_bytes=100_000)) as bank:
        source = bank.find(KEY)
        assert source is not None and source.stop is not None
        stop = int(source.stop)
        spans = bank.spans(source.id)
        for tokens, span in zip(bank.read([(s, s.tokens) for s in spans]), spans, strict=True):
            assert float(tokens.size.sum()) == 8 * float(span.stop - span.start)
        fill(bank, KEY, range(stop, 300))
        check_whole(bank, source.id, seconds=300)
        assert on_disk(folder / source.folder) <= 100_000


@pytest.mark.parametrize("where", ["append", "merge_spans", "move_spans"])
def test_a_full_disk_while_making_room_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    owner = SegmentWriter if where == "append" else Catalog
    with (
        Bank.open(tmp_path, limits=Limits(source_bytes=100_000)) as bank,
        bank.writer(KEY, path="a", name="a") as writer,
    ):
        number = 0
        while not any(s.level for s in bank.spans(writer.source_id)):
            put(writer, number)
            number += 1
        failing = True
        real: Callable[..., object] = getattr(owner, where)

        def full(*args: object, **named: object) -> object:
            if failing and (where != "append" or len(args[1]) > 3000):  # type: ignore[arg-type]
                raise OSError(28, "No space left on device")
            return real(*args, **named)

        monkeypatch.setattr(owner, where, full)
        with pytest.raises(BankError, match="disk is full"):
            while number < 3000:
                put(writer, number)
                number += 1
        failing = False
        for more in range(number, number + 300):
            put(writer, more)
        check_whole(bank, writer.source_id, seconds=number + 300)


def test_a_reader_never_gets_other_tokens_than_it_asked_for(tmp_path: Path) -> None:
    with Bank.open(tmp_path) as reader, Bank.open(tmp_path, limits=Limits(source_bytes=100_000)) as bank:
        with bank.writer(KEY, path="a", name="a") as writer:
            held: dict[int, SpanRecord] = {}
            told = 0
            for number in range(400):
                put(writer, number)
                if number % 20 == 0:
                    held |= {s.id: s for s in reader.spans(writer.source_id)}
                    for span in list(held.values()):
                        try:
                            [tokens] = reader.read([(span, span.tokens)])
                        except BankError as error:
                            assert "to make room since it was looked up; ask again" in str(error)
                            told += 1
                            del held[span.id]
                            continue
                        assert float(tokens.size.sum()) == 8 * float(span.stop - span.start)
                        assert float(tokens.pts_seconds.min()) == span.start
            assert told > 50


def test_moved_spans_are_read_from_where_they_went(tmp_path: Path) -> None:
    """A pair of dead spans in a file empties it of its living one, whose record a reader may hold."""
    with Bank.open(tmp_path, codec="fp16") as bank:
        source_id = store(bank, KEY, range(4))
        spans = bank.spans(source_id)
        with bounds.Folder(bank).held(source_id) as holding:
            assert holding is not None
            bank._catalog.expire_spans(source_id, spans[:3], reason="space")
            for span in spans[:3]:
                holding._gone(span)
            holding.reclaim(0.5)
        [kept] = bank.spans(source_id)
        assert kept.id == spans[3].id and kept.file != spans[3].file
        assert_same(bank.read([(spans[3], 100)])[0], span_tokens(3))
        with pytest.raises(BankError, match="ask again"):
            bank.read([(spans[0], 100)])


def test_an_append_costs_the_same_however_much_is_remembered(tmp_path: Path) -> None:
    """Steps of SQLite's machine per append, over whole rounds of making room: no walk over all spans."""

    def steps(folder: Path, tokens: int) -> float:
        with Bank.open(folder, limits=Limits(source_tokens=tokens)) as bank, bank.writer(KEY, path="a", name="a") as w:
            full = tokens // 8 + 100
            for number in range(full):
                put(w, number)
            count = 0

            def step() -> int:
                nonlocal count
                count += 1
                return 0

            bank._catalog._db.set_progress_handler(step, 10)
            for number in range(full, full + 200):
                put(w, number)
            bank._catalog._db.set_progress_handler(None, 0)
            return 10 * count / 200

    few, many = steps(tmp_path / "few", 8 * 100), steps(tmp_path / "many", 8 * 600)
    assert many < 1.3 * few, (few, many)


def test_catalogue_gives_back_what_is_gone(tmp_path: Path) -> None:
    with Bank.open(tmp_path) as bank:
        source_id = fill(bank, KEY, range(800))
        catalog = bank._catalog
        catalog.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        before = catalog.own_bytes()
        spans = bank.spans(source_id)
        for first in range(0, 700, 100):
            catalog.expire_spans(source_id, spans[first : first + 100], reason="space")
        catalog.give_back()
        catalog.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        assert catalog.own_bytes() < 0.8 * before
        assert len(bank.spans(source_id)) == 100
        assert catalog.integrity() == []
        [gone] = bank.expired(source_id)
        assert gone.spans == gone.stop == 700


def test_keep_all_is_untouched_without_limits(tmp_path: Path) -> None:
    with Bank.open(tmp_path) as bank:
        source_id = fill(bank, KEY, range(50))
        assert [(s.level, s.tokens) for s in bank.spans(source_id)] == [(0, 8)] * 50
        assert replace(bank.source(source_id)).num_bytes == on_disk(tmp_path / bank.source(source_id).folder)
