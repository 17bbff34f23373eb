from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from streamvid.budget import Limits
from streamvid.errors import BankError, MissingExtra, SettingsError
from streamvid.memory import bank as bank_module
from streamvid.memory import faiss_index, segments
from streamvid.memory.bank import Bank
from streamvid.memory.place import default_folder
from streamvid.memory.records import State
from tests.memory.ingest_process import LIVE_SPANS
from tests.memory.spans import (
    KEY,
    append,
    assert_same,
    best,
    source_key,
    span_keys,
    span_times,
    span_tokens,
    store,
)

ROOT = Path(__file__).parents[2]


def one_line(caught: pytest.ExceptionInfo[BankError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_what_is_stored_is_there_in_the_next_bank(tmp_path: Path) -> None:
    with Bank.open(tmp_path / "deep" / "memory", codec="fp16") as bank:
        source_id = store(bank, KEY, range(3))
    with Bank.open(tmp_path / "deep" / "memory", create=False) as bank:
        source = bank.find(KEY)
        assert source is not None and source.id == source_id
        assert source.state is State.COMPLETE and source.summary == {"frames": 3}
        assert (source.spans, source.tokens, source.name, source.path) == (3, 300, "a.mp4", "/videos/a.mp4")
        assert source.stop == source.duration == span_times(2)[1] == Fraction(6006, 1000)
        spans = bank.spans(source_id)
        assert [(s.start, s.stop) for s in spans] == [span_times(n) for n in range(3)]
        assert_same(bank.read([(spans[1], 100)])[0], span_tokens(1))


def test_read_gives_what_was_asked_in_the_order_asked(tmp_path: Path) -> None:
    with Bank.open(tmp_path, codec="fp16", segment_bytes=20_000) as bank:
        source_id = store(bank, KEY, range(5))
        spans = bank.spans(source_id)
        assert len({s.file for s in spans}) > 1
        got = bank.read([(spans[4], 7), (spans[0], 100), (spans[2], 1)])
        for tokens, (number, count) in zip(got, [(4, 7), (0, 100), (2, 1)], strict=True):
            assert_same(tokens, best(span_tokens(number), count))
        with pytest.raises(ValueError, match="has 100 tokens, asked for 101"):
            bank.read([(spans[0], 101)])


def test_smaller_budgets_read_fewer_bytes(tmp_path: Path) -> None:
    read = []
    for count in (10, 64, 100):
        with Bank.open(tmp_path, codec="fp16") as bank:
            source = bank.find(KEY)
            source_id = store(bank, KEY, range(4)) if source is None else source.id
            bank.read([(span, count) for span in bank.spans(source_id)])
            read.append(bank.bytes_read)
    row = 40 + 2 * 2 * 16
    assert read[0] == read[1] and read[2] - read[1] == 4 * (36 * row + 4)


def test_view_pads_keys_and_index_finds_spans(tmp_path: Path) -> None:
    with Bank.open(tmp_path) as bank:
        with bank.writer(KEY, path="a", name="a") as writer:
            for number, count in enumerate((2, 0, 3)):
                keys = torch.cat([span_keys(number, count), torch.zeros(1, 8)])
                start, stop = span_times(number)
                writer.append(span_tokens(number), start=start, stop=stop, keys=keys)
            source_id = writer.source_id
        ids, view = bank.view(source_id)
        assert ids.tolist() == [span.id for span in bank.spans(source_id)]
        keys = view.keys[torch.arange(3)]
        assert keys.shape == (3, 3, 8) and view.key_width == 8
        torch.testing.assert_close(keys.norm(dim=2), torch.tensor([[1.0, 1, 0], [0, 0, 0], [1, 1, 1]]))
        torch.testing.assert_close(view.keys[torch.tensor([2, 1])], keys[[2, 1]])
        torch.testing.assert_close(view.select(torch.tensor([1, 2])).keys[torch.tensor([1])], keys[[2]])
        assert view.likeness(keys[2, 1], torch.tensor([2, 1])).tolist() == [pytest.approx(1), -1]
        assert view.tokens.tolist() == [100, 100, 100]
        assert view.start_seconds.tolist() == [float(span_times(n)[0]) for n in range(3)]
        spans = bank.spans(source_id)
        for kind in ("auto", "flat", "faiss"):
            ids, similarity = bank.index(source_id, kind=kind).search(span_keys(2, 3)[1], 5)
            assert ids.tolist() == [spans[2].id, spans[0].id]
            assert similarity[0] == pytest.approx(1, abs=1e-6)


def test_index_without_faiss_is_flat_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(faiss_index.importlib, "import_module", missing)
    with Bank.open(tmp_path) as bank:
        source_id = store(bank, KEY, range(2))
        assert "without faiss" in bank.index(source_id).note
        assert bank.index(source_id).note == ""
        with pytest.raises(MissingExtra):
            bank.index(source_id, kind="faiss")
        with pytest.raises(SettingsError, match="did you mean flat"):
            bank.index(source_id, kind="flatt")


def test_red_never_answers_for_blue(tmp_path: Path) -> None:
    """Two sources of one name, size, length and times, told apart by content alone."""
    red, blue = source_key("red"), source_key("blue")
    with Bank.open(tmp_path, codec="fp16") as bank:
        ids = {"red": store(bank, red, range(3), seed=0), "blue": store(bank, blue, range(3), seed=500)}
        for name, key, seed in (("red", red, 0), ("blue", blue, 500)):
            source = bank.find(key)
            assert source is not None and source.id == ids[name]
            spans = bank.spans(source.id)
            for number, tokens in enumerate(bank.read([(s, 100) for s in spans])):
                assert_same(tokens, span_tokens(seed + number))
            found, _ = bank.index(source.id).search(span_keys(500)[0], 3)
            assert set(found.tolist()) <= {s.id for s in spans}
        assert bank.find(source_key("green")) is None
        folders = [tmp_path / s.folder for s in bank.sources()]
        red_file, blue_file = (folder / "000000.seg" for folder in folders)
        blue_bytes = blue_file.read_bytes()
        red_file.write_bytes(blue_bytes)
        with pytest.raises(BankError, match="another source"):
            bank.read([(bank.spans(ids["red"])[0], 5)])


@pytest.fixture(scope="module")
def ingesting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """`tests.memory.ingest_process` at work, and its folder."""
    folder = tmp_path_factory.mktemp("ingesting")
    command = [sys.executable, "-m", "tests.memory.ingest_process", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        yield process, folder
        process.kill()


def test_another_process_reads_while_one_writes(ingesting: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = ingesting
    seen: list[int] = []
    with Bank.open(folder / "live") as bank:
        while not seen or seen[-1] < LIVE_SPANS:
            assert process.poll() is None or bank.find(KEY) is not None
            source = bank.find(KEY)
            if source is None:
                time.sleep(0.01)
                continue
            spans = bank.spans(source.id)
            if spans:
                assert_same(bank.read([(spans[-1], 100)])[0], span_tokens(len(spans) - 1))
                assert len(bank.view(source.id)[0]) >= len(spans)
            seen.append(len(spans))
    assert seen == sorted(seen)


def test_killed_at_any_point_keeps_what_was_stored_and_goes_on(ingesting: tuple[subprocess.Popen[str], Path]) -> None:
    """SIGKILL in mid-write, after the write, after the sync, before and after the commit; first and later span."""
    process, _ = ingesting
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    cases = [json.loads(line) for line in output.splitlines()]
    assert len(cases) == 10 and all(case["killed"] for case in cases)
    for case in cases:
        with Bank.open(Path(case["folder"]), codec="fp16", segment_bytes=20_000) as bank:
            source = bank.find(KEY)
            assert source is not None and source.state is State.OPEN
            assert source.spans == case["stored"], case
            assert source.stop == (span_times(case["stored"] - 1)[1] if case["stored"] else None)
            for number, tokens in enumerate(bank.read([(s, 100) for s in bank.spans(source.id)])):
                assert_same(tokens, span_tokens(number))
            with bank.writer(KEY, path="/v/a.mp4", name="a.mp4") as writer:
                assert writer.stop == source.stop and writer.source_id == source.id
                for number in range(case["stored"], 6):
                    append(writer, number)
                writer.finish({})
            for number, tokens in enumerate(bank.read([(s, 100) for s in bank.spans(source.id)])):
                assert_same(tokens, span_tokens(number))
            held = sum(p.stat().st_size for p in (Path(case["folder"]) / "segments").rglob("*.seg"))
            after = bank.find(KEY)
            assert after is not None and after.num_bytes == held


def test_second_writer_is_refused_by_name_until_the_first_is_done(tmp_path: Path) -> None:
    with Bank.open(tmp_path) as bank, Bank.open(tmp_path) as other:
        with bank.writer(KEY, path="a", name="a.mp4") as writer:
            append(writer, 0)
            with pytest.raises(BankError, match=f"a.mp4 is being written by process {os.getpid()}; wait") as caught:
                other.writer(KEY, path="a", name="a.mp4").__enter__()
            one_line(caught)
            with pytest.raises(BankError, match="being written"):
                other.remove(writer.source_id)
            store(other, source_key("other"), range(1))
        with other.writer(KEY, path="a", name="a.mp4") as writer:
            append(writer, 1)
        assert len(bank.spans(writer_source(bank))) == 2


def writer_source(bank: Bank) -> int:
    source = bank.find(KEY)
    assert source is not None
    return source.id


def test_complete_source_takes_no_more(tmp_path: Path) -> None:
    with Bank.open(tmp_path) as bank:
        store(bank, KEY, range(1))
        with pytest.raises(BankError, match="completely remembered"):
            bank.writer(KEY, path="a", name="a").__enter__()


def test_writer_checks_what_it_is_given(tmp_path: Path) -> None:
    start, stop = span_times(1)
    with Bank.open(tmp_path) as bank, bank.writer(KEY, path="a", name="a") as writer:
        append(writer, 1)
        with pytest.raises(ValueError, match="not before"):
            append(writer, 0)
        with pytest.raises(ValueError, match="before it stops"):
            writer.append(span_tokens(0), start=stop, stop=stop, keys=span_keys(0))
        with pytest.raises(ValueError, match=r"keys must be \(K, 8\)"):
            writer.append(span_tokens(0), start=start, stop=stop, keys=torch.ones(1, 9))
        with pytest.raises(ValueError, match="finite"):
            writer.append(span_tokens(0), start=start, stop=stop, keys=torch.full((1, 8), float("nan")))
        writer.finish({})
        with pytest.raises(ValueError, match="before finish"):
            append(writer, 2)
        assert len(bank.spans(writer_source(bank))) == 1


def test_note_when_features_are_beyond_fp16(tmp_path: Path) -> None:
    with Bank.open(tmp_path, codec="fp16") as bank, bank.writer(KEY, path="a", name="a") as writer:
        for number in range(2):
            tokens = span_tokens(number)
            tokens.features[0, 0] = 1e6
            start, stop = span_times(number)
            writer.append(tokens, start=start, stop=stop, keys=span_keys(number))
            assert_same(bank.read([(bank.spans(writer.source_id)[-1], 100)])[0], tokens)
        assert len(writer.notes) == 1 and bank.spans(writer.source_id)[0].codec == "fp32"


@pytest.mark.parametrize("below", [False, True])
def test_file_in_place_of_folder_is_one_clear_line(tmp_path: Path, below: bool) -> None:
    (tmp_path / "file").write_text("diary")
    with pytest.raises(BankError, match="is, or lies below, a file") as caught:
        Bank.open(tmp_path / "file" / "memory" if below else tmp_path / "file")
    one_line(caught)
    assert (tmp_path / "file").read_text() == "diary"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write to")
def test_folder_that_cannot_be_written_is_one_clear_line() -> None:
    with pytest.raises(BankError, match="choose another folder") as caught:
        Bank.open(Path("/proc/streamvid"))
    one_line(caught)


def test_no_memory_and_no_wish_to_create_it(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="there is no memory in"):
        Bank.open(tmp_path / "nothing", create=False)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(SettingsError, match="no codec"):
        Bank.open(tmp_path / "nothing", codec="fp8")


def test_full_disk_loses_nothing_and_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = segments.write_at

    def full(fd: int, data: bytes, offset: int) -> None:
        real(fd, data[:777], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    with Bank.open(tmp_path, codec="fp16") as bank, bank.writer(KEY, path="a", name="a") as writer:
        append(writer, 0)
        used = bank.usage()
        with monkeypatch.context() as patch:
            patch.setattr(segments, "write_at", full)
            for _ in range(2):
                with pytest.raises(BankError, match="the disk is full; free some space") as caught:
                    append(writer, 1)
                one_line(caught)
        [span] = bank.spans(writer.source_id)
        assert_same(bank.read([(span, 100)])[0], span_tokens(0))
        assert bank.usage() == used and writer.stop == span_times(0)[1]
        append(writer, 1)
        assert_same(bank.read([(bank.spans(writer.source_id)[1], 100)])[0], span_tokens(1))


def test_full_disk_in_the_catalogue_takes_the_span_back(tmp_path: Path) -> None:
    """SQLite itself refuses to grow, as it does on a full disk."""
    with Bank.open(tmp_path, codec="fp16") as bank, bank.writer(KEY, path="a", name="a") as writer:
        append(writer, 0)
        file = next(tmp_path.rglob("*.seg"))
        held = file.stat().st_size
        wide = span_tokens(1)
        keys = torch.randn(100, 8)  # more than fits in the pages there are
        bank._catalog._db.execute("PRAGMA max_page_count = 1")
        start, stop = span_times(1)
        with pytest.raises(BankError, match="the disk is full") as caught:
            for _ in range(9):
                writer.append(wide, start=start, stop=stop, keys=keys)
        one_line(caught)
        stored = len(bank.spans(writer.source_id))
        bank._catalog._db.execute("PRAGMA max_page_count = 1000000")
        writer.append(wide, start=start, stop=stop, keys=keys)
        spans = bank.spans(writer.source_id)
        assert len(spans) == stored + 1
        assert sum(s.num_bytes for s in spans[1:]) == file.stat().st_size - held
        assert_same(bank.read([(spans[-1], 100)])[0], wide)


def test_disk_limit_is_checked_before_writing(tmp_path: Path) -> None:
    """Of a source that is kept whole; others make room, see `test_bounds`."""
    with Bank.open(tmp_path) as bank:
        limit = bank.usage() + 1_000_000
    with Bank.open(tmp_path, limits=Limits(disk_bytes=limit)) as bank:
        with bank.writer(KEY, path="a", name="a") as writer:
            with pytest.raises(BankError, match=f"may hold {limit} bytes, holds") as caught:
                for number in range(1000):
                    append(writer, number)
                    bank.pin(writer.source_id)
            assert "raise the limit" in one_line(caught)
            stored = bank.spans(writer.source_id)
        assert limit // 3 < bank.usage() <= limit
        bank.read([(span, 100) for span in stored])


def test_remove_forgets_one_source_wholly(tmp_path: Path) -> None:
    with Bank.open(tmp_path) as bank:
        keep = store(bank, source_key("keep"), range(2), name="keep.mp4")
        gone = store(bank, KEY, range(2), name="gone.mp4")
        span = bank.spans(gone)[0]
        bank.save_answer(gone, question="q", answer="a", receipt={})
        folder = tmp_path / next(s.folder for s in bank.sources() if s.id == gone)
        assert folder.exists()
        assert bank.remove("gone.mp4").id == gone
        assert not folder.exists() and bank.find(KEY) is None
        assert bank.spans(gone) == [] and bank.answers(gone) == []
        assert [s.id for s in bank.sources()] == [keep] and len(bank.spans(keep)) == 2
        with pytest.raises(BankError, match="was removed"):
            bank.read([(span, 1)])
        again = store(bank, KEY, range(1), name="gone.mp4")
        assert again > gone


def test_space_of_a_half_removed_source_is_given_back(tmp_path: Path) -> None:
    with Bank.open(tmp_path) as bank:
        store(bank, KEY, range(1))
        orphan = tmp_path / "segments" / "0123456789ab-77"
        orphan.mkdir()
        (orphan / "000000.seg").write_bytes(b"left behind")
        bank.remove(bank.sources()[0])
        assert not orphan.exists()


def test_sources_are_named_by_id_key_name_or_path(tmp_path: Path) -> None:
    with Bank.open(tmp_path) as bank:
        with pytest.raises(BankError, match="nothing is remembered"):
            bank.source("a.mp4")
        first = store(bank, KEY, range(1), name="a.mp4")
        second = store(bank, source_key("x"), range(1), name="b.mp4")
        for which in (first, str(first), KEY.short, KEY.digest, "a.mp4", "/videos/a.mp4"):
            assert bank.source(which).id == first
        with pytest.raises(BankError, match=r"did you mean .*a\.mp4"):
            bank.source("a.mp3")
        third = store(bank, source_key("y"), range(1), name="b.mp4")
        with pytest.raises(BankError, match=f"names 2 remembered sources.*{second} .*{third} "):
            bank.remove("b.mp4")
        assert len(bank.sources()) == 3


def test_answers_are_kept_with_their_receipts(tmp_path: Path) -> None:
    with Bank.open(tmp_path) as bank:
        source_id = store(bank, KEY, range(1))
        receipt = {"cache": "hit", "spans": [{"start": "1/3", "score": 0.5}]}
        bank.save_answer(source_id, question="what?", answer="a 'red' circle", receipt=receipt)
    with Bank.open(tmp_path) as bank:
        [answer] = bank.answers(source_id)
        assert (answer.question, answer.answer, answer.receipt) == ("what?", "a 'red' circle", receipt)


def test_digest_is_not_read_twice_and_never_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit that keeps size, inode and mtime is still seen: its ctime moved."""
    monkeypatch.setattr(bank_module, "SETTLED_NS", 0)
    reads = []
    real = bank_module.keys_module.content_digest
    monkeypatch.setattr(bank_module.keys_module, "content_digest", lambda path: reads.append(path) or real(path))
    video = tmp_path / "v.mp4"
    video.write_bytes(b"red")
    with Bank.open(tmp_path / "m") as bank:
        red = bank.content_digest(video)
        assert bank.content_digest(video) == red == real(video) and len(reads) == 1
        stat = video.stat()
        while video.stat().st_ctime_ns == stat.st_ctime_ns:  # the clock of the file system is coarse
            video.write_bytes(b"blu")
            os.utime(video, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert video.stat().st_mtime_ns == stat.st_mtime_ns
        assert bank.content_digest(video) == real(video) != red
        moved = video.rename(tmp_path / "w.mp4")
        assert bank.content_digest(moved) == real(moved)


def test_digest_of_a_file_just_changed_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = tmp_path / "v.mp4"
    video.write_bytes(b"red")
    with Bank.open(tmp_path / "m") as bank:
        bank.content_digest(video)
        assert bank._catalog._rows("SELECT * FROM digests") == []


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STREAMVID_MEMORY", str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv("STREAMVID_MEMORY")
    assert default_folder().parts[-2:] == ("streamvid", "memory")
