"""What is recorded is what was shown: bit for bit, at the same times, over kills, changes and restarts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from av.packet import Packet
from av.video.stream import VideoStream
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from streamvid.errors import SettingsError, SourceError, UnsupportedError
from streamvid.frames import Frame
from streamvid.ingest import recorder
from streamvid.ingest import recording as module
from streamvid.ingest.live import LiveReader
from streamvid.ingest.named import Decoding, find, make
from streamvid.ingest.openers import FileOpener
from streamvid.ingest.recording import Recording
from streamvid.ingest.ring import Logbook, RecordTo, recording_folder, recording_of
from streamvid.ingest.source import Source
from streamvid.ingest.supervised import Patience, Supervised
from streamvid_cli.app import app
from tests.ingest.gst import gst_server, pack
from tests.ingest.here import open_source
from tests.ingest.synthetic import even, numbers, write

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
HEVC = {"x265-params": "bframes=3:keyint=12:open-gop=1:log-level=error", "crf": "12"}
FILMS = {
    "h264.mp4": ("libx264", None),
    "h264.ts": ("libx264", None),
    "h264.mkv": ("libx264", None),
    "hevc.ts": ("libx265", HEVC),
    "hevc.mp4": ("libx265", HEVC),
}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Ten seconds of ten pictures a second with B-frames; each shows its number."""
    folder = tmp_path_factory.mktemp("films")
    return {
        name: write(folder / name, even(100), codec=codec, options=options, noise=20, size=(64, 320))
        for name, (codec, options) in FILMS.items()
    }


def watch(film: Path | str, to: RecordTo) -> list[Frame]:
    """Frames of a file that stands in for a camera, recorded in the process that decodes."""
    with Supervised(film, record=to, origin=NOON) as watched:
        return [item for item in watched if isinstance(item, Frame)]


def connect(log: Logbook, film: Path, at: float, pictures: int | None = None, why: str = "") -> list[Frame]:
    """One connection, recorded here; its first picture lies ``at`` in the stream."""
    reader = make(find(film), Decoding(record=log.connection()))
    frames = []
    with closing(Source(reader)) as source, source.frames() as shown:
        for frame in shown:
            pts = frame.pts + Fraction(at).limit_denominator(1000)
            log.placed(frame.pts, pts, why)
            frames.append(Frame(frame.pixels, pts, frame.duration))
            if len(frames) == pictures:
                break
    return frames


def book(to: RecordTo) -> Logbook:
    return Logbook(to, origin=NOON, today=NOON)


def again(recording: Recording, start: float | Fraction, stop: float | Fraction) -> list[Frame]:
    with recording.open(start, stop, isolate=False) as frames:
        return list(frames)


def same(frames: list[Frame], others: list[Frame]) -> bool:
    return [f.pts for f in frames] == [f.pts for f in others] and all(
        torch.equal(a.pixels, b.pixels) for a, b in zip(frames, others, strict=True)
    )


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.mp4"))


@pytest.mark.parametrize("name", FILMS)
def test_what_was_shown_is_decoded_again_bit_for_bit(name: str, films: dict[str, Path], tmp_path: Path) -> None:
    shown = watch(films[name], RecordTo(tmp_path, segment_seconds=2))
    assert len(shown) == 100 and len(files(tmp_path)) == 5
    recording = Recording(tmp_path)
    ((start, stop),) = recording.spans()
    assert (start, stop) == (Fraction(0), shown[-1].pts + shown[-1].duration)
    with recording.open(0, 100) as frames:  # in another process
        assert same(list(frames), shown)
    for begin, end in ((Fraction(21, 10), Fraction(24, 10)), (Fraction(31, 10), Fraction(57, 10)), (4, 5)):
        assert same(again(recording, begin, end), [frame for frame in shown if begin <= frame.pts < end])


def test_files_begin_with_a_key_frame_and_hold_the_packets_of_the_source(
    films: dict[str, Path], tmp_path: Path
) -> None:
    watch(films["h264.mp4"], RecordTo(tmp_path, segment_seconds=2))
    data: list[bytes] = []
    for path in files(tmp_path):
        with av.open(str(path)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        assert packets[0].is_keyframe and packets[0].pts == int(path.name.split("-")[1])
        data += [bytes(packet) for packet in packets]
    with av.open(str(films["h264.mp4"])) as container:
        assert data == [bytes(packet) for packet in container.demux(video=0) if packet.size]


def test_without_record_nothing_is_written(films: dict[str, Path], tmp_path: Path) -> None:
    with Supervised(films["h264.mp4"]) as watched:
        assert sum(isinstance(item, Frame) for item in watched) == 100
    with pytest.raises(SourceError, match="holds no recording; watch with --record"):
        Recording(tmp_path)


def test_decoding_gives_the_same_with_and_without_recording(films: dict[str, Path], tmp_path: Path) -> None:
    """A packet that was written must reach the decoder as it came."""
    recorded = watch(films["hevc.ts"], RecordTo(tmp_path / "recording"))
    with Supervised(films["hevc.ts"], origin=NOON) as watched:
        assert same(recorded, [item for item in watched if isinstance(item, Frame)])
    with Supervised(films["hevc.ts"], sampling=2, record=RecordTo(tmp_path / "sampled")) as watched:
        sampled = [item for item in watched if isinstance(item, Frame)]
    assert same(sampled, recorded[::5]) and same(again(Recording(tmp_path / "sampled"), 0, 100), recorded)


def test_a_film_that_is_recorded_does_not_become_a_camera(films: dict[str, Path], tmp_path: Path) -> None:
    with open_source(films["h264.mp4"], record=RecordTo(tmp_path)) as source:
        assert not source.info.live


@dataclass(frozen=True)
class Untimed(FileOpener):
    """A film whose pictures count from when they come, as those of a camera without times."""

    timeless: bool = True
    slack: Fraction | None = Fraction(0)


def test_pictures_without_times_are_found_when_they_came(tmp_path: Path) -> None:
    film = write(tmp_path / "film.avi", even(30), codec="mjpeg", size=(64, 320))
    log = book(RecordTo(tmp_path / "r"))
    reader = LiveReader(Untimed(film, "film"), log.connection())
    shown = []
    with reader.pictures() as pictures:
        for picture in pictures:
            log.placed(picture.pts, picture.pts, "")
            shown.append((picture.pts, picture.pixels()))
            time.sleep(0.03)
    assert len(shown) == 30
    frames = again(Recording(tmp_path / "r"), 0, 100)
    pairs = list(zip(shown[-len(frames) :], frames, strict=True))
    assert len(frames) >= 29 and all((pixels == frame.pixels.numpy()).all() for (_, pixels), frame in pairs)
    assert all(abs(pts - frame.pts) <= Fraction(6, 100) for (pts, _), frame in pairs)


KILLED = """
import os, sys
from pathlib import Path
from tests.ingest.test_recorder import NOON, Logbook, RecordTo, make, find, Decoding
log = Logbook(RecordTo(sys.argv[2], segment_seconds=2), origin=NOON, today=NOON)
reader = make(find(sys.argv[1]), Decoding(record=log.connection()))
pictures = reader.pictures()
for k in range(55):
    picture = next(pictures)
    log.placed(picture.pts, picture.pts, "")
os.kill(os.getpid(), 9)
"""


def test_a_killed_process_leaves_files_that_read(films: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(films["h264.mp4"]), str(tmp_path)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode == -signal.SIGKILL
    recording = Recording(tmp_path)
    ((_, stop),) = recording.spans()
    assert stop >= Fraction(54, 10)  # of 5.5 s the last packet at most
    with open_source(films["h264.mp4"]) as source:
        shown = [frame for frame in source.frames() if frame.pts < stop]
    assert same(again(recording, 0, 10), shown)
    book(RecordTo(tmp_path)).close()  # nobody holds the folder any more


@pytest.mark.parametrize("cut", [1, 7, 200, 3000])
def test_a_torn_end_costs_the_pictures_it_held(films: dict[str, Path], tmp_path: Path, cut: int) -> None:
    shown = watch(films["h264.ts"], RecordTo(tmp_path, segment_seconds=60))
    (path,) = files(tmp_path)
    os.truncate(path, path.stat().st_size - cut)
    frames = again(Recording(tmp_path), 0, 100)
    assert 90 <= len(frames) < 100 and same(frames[:95], shown[: len(frames)][:95])


def test_times_survive_a_restart_and_gaps_stay_gaps(films: dict[str, Path], tmp_path: Path) -> None:
    to = RecordTo(tmp_path, segment_seconds=2)
    log = book(to)
    first = connect(log, films["h264.ts"], 100, 50)
    second = connect(log, films["h264.mp4"], 112.5, 50, why="refused the connection")
    log.close()
    after = Logbook(to, origin=None, today=NOON + timedelta(hours=1))
    assert after.origin == NOON
    third = connect(after, films["hevc.mp4"], 3600)
    recording = Recording(tmp_path)
    assert [float(start) for start, _ in recording.spans()] == [100, 112.5, 3600]
    for frames in (first, second, third):
        assert same(again(recording, frames[0].pts, frames[-1].pts)[:-1], frames[:-2])
    whole = again(recording, 0, 4000)
    assert {frame.pts for frame in first + second + third} <= {frame.pts for frame in whole}
    one, two = recording.find(103, 114)
    assert [one.start, one.file_start, two.stop] == [103, 3 + Fraction(1, 5), 114]
    with pytest.raises(SourceError, match=r"no video 12:01:4\d-12:01:52: refused the connection"):
        recording.open(111, 112)
    with pytest.raises(SourceError, match="12:00:10-12:00:20 was not recorded: recording began at 12:01:40"):
        recording.open(10, 20)
    with pytest.raises(SourceError, match="13:10:00-13:10:01 is not recorded: the recording ends at 13:00:10"):
        recording.open(4200, 4201)


def test_one_process_records_into_a_folder_and_on_one_clock(tmp_path: Path) -> None:
    log = book(RecordTo(tmp_path))
    with pytest.raises(SettingsError, match="by another process; give another folder"):
        book(RecordTo(tmp_path))
    log.close()
    with pytest.raises(SettingsError, match=r"counts from 2026-03-01 12:00:00 and the stream from 2026-03-01 13:00:00"):
        Logbook(RecordTo(tmp_path), origin=NOON + timedelta(hours=1), today=NOON)
    with Supervised("lavfi:testsrc", record=RecordTo(tmp_path)) as watched:
        assert watched.origin == NOON


def test_another_size_begins_another_run_at_its_own_size(tmp_path: Path) -> None:
    small = write(tmp_path / "small.ts", even(40), size=(64, 320), noise=20)
    large = write(tmp_path / "large.ts", even(40, start=4.2), size=(96, 480), noise=20, first=40)
    both = tmp_path / "both.ts"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    shown = watch(both, RecordTo(tmp_path / "r", segment_seconds=60))
    assert {tuple(frame.pixels.shape) for frame in shown} == {(64, 320, 3)}  # the second part is scaled
    recording = Recording(tmp_path / "r")
    first, second = recording.find(0, 100)
    assert first.run != second.run and first.stop == second.start
    frames = again(recording, 0, 100)
    assert [frame.pts for frame in frames] == [frame.pts for frame in shown] and numbers(frames) == list(range(80))
    assert [tuple(frame.pixels.shape[:2]) for frame in frames] == [(64, 320)] * 40 + [(96, 480)] * 40
    with av.open(str(second.files[-1])) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (480, 96)
    with pytest.raises(SourceError, match="in 2 pieces, 12:00:00-12:00:04, 12:00:04-12:00:08; write one of them"):
        recording.export(0, 8, tmp_path / "clip.mp4")


def test_a_clock_that_falls_is_followed(tmp_path: Path) -> None:
    part = write(tmp_path / "part.ts", even(40), noise=20)
    twice = tmp_path / "twice.ts"
    twice.write_bytes(part.read_bytes() * 2)
    shown = watch(twice, RecordTo(tmp_path / "r", segment_seconds=2))
    assert len(shown) == 80
    frames = again(Recording(tmp_path / "r"), 0, 100)
    assert [frame.pts for frame in frames] == [frame.pts for frame in shown]
    assert numbers(frames) == [*range(40), *range(40)]


def test_a_clock_that_was_set_anew_moves_what_comes_after(films: dict[str, Path], tmp_path: Path) -> None:
    log = book(RecordTo(tmp_path, segment_seconds=2))
    with closing(make(find(films["h264.ts"]), Decoding(record=log.connection()))) as reader:
        assert isinstance(reader, LiveReader)
        for picture in reader.pictures():
            log.placed(picture.pts, picture.pts + (100 if picture.pts >= 5 else 0), "")
    recording = Recording(tmp_path)
    assert [(float(a), float(b)) for a, b in recording.spans()] == [(0, 5), (105, 110)]
    assert numbers(again(recording, 4, 106)) == list(range(40, 60))
    assert [frame.pts for frame in again(recording, 105, 106)] == even(10, start=105)
    with pytest.raises(SourceError, match="no video 12:00:05-12:01:45"):
        recording.open(50, 60)
    clip = recording.export(4, 106, tmp_path / "clip.mp4")  # the packets go on, whatever the clock said
    with open_source(clip.path) as source:
        assert list(range(36, 60)) == numbers(list(source.frames()))[:24]


@pytest.mark.parametrize("lost", ["dts", "first"])
def test_packets_without_all_of_their_times_are_recorded(
    films: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """RTSP sources may tell no time of decoding, and none at all for the first packet."""
    take, count = recorder.Recorder.take, 0

    def without(self: recorder.Recorder, packet: Packet[VideoStream]) -> None:
        nonlocal count
        count += 1
        kept = packet.pts, packet.dts
        if lost == "dts":
            packet.dts = None
        elif count == 1:
            packet.pts = packet.dts = None
        take(self, packet)
        packet.pts, packet.dts = kept

    monkeypatch.setattr(recorder.Recorder, "take", without)
    shown = connect(book(RecordTo(tmp_path, segment_seconds=2)), films["h264.ts"], 0)
    frames = again(Recording(tmp_path), 0, 100)
    assert same(frames, shown[1:] if lost == "first" else shown)


def test_the_oldest_files_go_when_there_are_too_many_bytes(films: dict[str, Path], tmp_path: Path) -> None:
    log = book(RecordTo(tmp_path, segment_seconds=1))
    connect(log, films["h264.mp4"], 0)
    every = files(tmp_path)
    size = sum(path.stat().st_size for path in every)
    log.close()
    to = RecordTo(tmp_path, segment_seconds=1, keep_bytes=size * 2 // 3)
    log = book(to)
    for turn in range(1, 4):
        connect(log, films["h264.mp4"], 20 * turn)
        assert sum(path.stat().st_size for path in files(tmp_path)) <= size * 2 // 3
    assert not set(every) & set(files(tmp_path)) and not every[0].parent.exists()
    recording = Recording(tmp_path)
    assert recording.spans()[-1][1] == 70
    assert same(again(recording, 65, 70)[1:], [f for f in again(recording, 0, 100) if f.pts >= 65][1:])
    with pytest.raises(SourceError, match=r"12:00:02-12:00:04 is not recorded any more: .* space .* \(--record-disk\)"):
        recording.open(2, 4)


def test_old_files_go_and_pinned_ones_stay(films: dict[str, Path], tmp_path: Path) -> None:
    log = book(RecordTo(tmp_path, segment_seconds=2))
    connect(log, films["h264.mp4"], 0)
    recording = Recording(tmp_path)
    recording.pin(5, Fraction(55, 10))
    now = time.time() + 100
    assert recording.tidy(keep_seconds=200, keep_bytes=None, now=lambda: now) == 0
    assert recording.tidy(keep_seconds=50, keep_bytes=None, now=lambda: now) == 4
    ((start, stop),) = recording.spans()
    assert (
        start <= 5
        and stop >= Fraction(55, 10)
        and numbers(again(recording, 5, Fraction(55, 10))) == list(range(50, 55))
    )
    with pytest.raises(SourceError, match=r"given up because of its age \(keep more: --record-keep\)"):
        recording.find(0, 1) or recording.open(0, 1)
    recording.unpin(5, Fraction(55, 10))
    assert recording.tidy(keep_seconds=50, keep_bytes=None, now=lambda: now) == 1 and recording.spans() == ()


def test_a_clip_begins_at_the_key_frame_before_and_says_so(films: dict[str, Path], tmp_path: Path) -> None:
    shown = watch(films["h264.ts"], RecordTo(tmp_path / "r", segment_seconds=2))
    recording = Recording(tmp_path / "r")
    for name in ("clip.mp4", "clip.mkv"):
        clip = recording.export(Fraction(31, 10), Fraction(57, 10), tmp_path / name)
        assert clip.start == Fraction(24, 10) and clip.stop >= Fraction(57, 10) and clip.num_bytes > 1000
        with open_source(clip.path) as source:
            frames = list(source.frames())
        wanted = [frame for frame in shown if clip.start <= frame.pts < clip.stop]
        assert numbers(frames) == list(range(24, 24 + len(frames)))
        assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(frames, wanted, strict=True))
        assert [f.pts - frames[0].pts for f in frames] == [f.pts - clip.start for f in wanted]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mkv", "clip.mp4", "r"]


def test_a_clip_that_cannot_be_written_leaves_what_was_there(films: dict[str, Path], tmp_path: Path) -> None:
    watch(films["h264.ts"], RecordTo(tmp_path / "r"))
    recording = Recording(tmp_path / "r")
    with pytest.raises(SourceError, match=r"clip.mp4 cannot be written: No such file or directory"):
        recording.export(1, 2, tmp_path / "nowhere" / "clip.mp4")
    with pytest.raises(SettingsError, match=r"clip.gif is no clip that can be written; known: .mkv, .mov, .mp4, .ts"):
        recording.export(1, 2, tmp_path / "clip.gif")
    (tmp_path / "clip.mp4").write_text("before")
    with pytest.raises(SourceError, match="the recording ends at"):
        recording.export(50, 60, tmp_path / "clip.mp4")
    assert (tmp_path / "clip.mp4").read_text() == "before"


def test_a_disk_that_fails_costs_the_recording_not_the_pictures(
    films: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "_RETRY_SECONDS", 0.0)
    log = book(RecordTo(tmp_path, segment_seconds=1))
    part, recording, shown = tmp_path / "00000001", Recording(tmp_path), []
    for frame in _breaking(log, films["h264.mp4"], part):
        shown.append(frame)
        if len(shown) == 50:
            assert recording.trouble == "Not a directory"
            assert log.look(1000) == "it is not recorded: Not a directory" and log.look(1001) is None
    assert len(shown) == 100 and recording.trouble is None and log.look(2000) == "it is recorded again"
    first, second = recording.spans()
    assert first[1] < 5 < second[0] and second[1] == 10
    with pytest.raises(SourceError, match="no video .*: nothing was recorded"):
        recording.open(first[1], second[0])


def _breaking(log: Logbook, film: Path, part: Path) -> Iterator[Frame]:
    """Pictures of a connection whose folder is a file for a while."""
    aside = part.with_name("aside")
    with closing(Source(make(find(film), Decoding(record=log.connection(), threads=1)))) as source:
        for k, frame in enumerate(source.frames()):
            log.placed(frame.pts, frame.pts, "")
            if k == 25:
                part.rename(aside)
                part.write_text("in the way")
            elif k == 60:
                part.unlink()
                aside.rename(part)
            yield frame


def test_what_has_no_packets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="lavfi:testsrc sends raw pictures, which are not recorded"):
        list(Supervised("lavfi:testsrc", record=RecordTo(tmp_path / "a")))
    with pytest.raises(UnsupportedError, match="an array is no stream of packets"):
        open_source(torch.zeros(2, 4, 4, 3, dtype=torch.uint8).numpy(), rate=1, record=RecordTo(tmp_path))
    film = write(tmp_path / "film.webm", even(5), codec="libvpx")
    with pytest.raises(UnsupportedError, match="sends vp8, which MP4 does not hold"):
        open_source(film, record=RecordTo(tmp_path / "b"))


def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="segment_seconds must be above 0, got 0"):
        RecordTo(tmp_path, segment_seconds=0)
    with pytest.raises(SettingsError, match="keep_bytes must be above 0, got -1; for no limit give None"):
        RecordTo(tmp_path, keep_bytes=-1)
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="nothing can be recorded into file: File exists"):
        book(RecordTo(tmp_path / "file"))


def test_the_command_writes_the_clip_that_was_asked_for(films: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no stream was recorded; watch with --record"):
        recording_of(tmp_path, None)
    connect(book(RecordTo(recording_folder(tmp_path, "front"), segment_seconds=2)), films["h264.mp4"], 60)
    clip = tmp_path / "clip.mp4"
    command = ["clip", "12:01:03", "12:01:05", str(clip), "--memory", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, "--json", "--pin"])
    told = json.loads(result.stdout)
    assert result.exit_code == 0 and told["start"] == "2026-03-01T12:01:02.400000+00:00" and told["stream"] == "front"
    assert told["bytes"] == clip.stat().st_size and 2.6 <= told["seconds"] <= 3
    assert "it begins at a key frame, 0.6 s early" in CliRunner().invoke(app, command).stdout
    refusal = CliRunner().invoke(app, [*command, "--stream", "frnt"])
    assert isinstance(refusal.exception, SettingsError) and "did you mean front?" in str(refusal.exception)
    assert Recording(tmp_path / "recordings" / "front").tidy(keep_seconds=None, keep_bytes=1) == 2


def test_wall_clock_times_mean_the_last_such_moment(films: dict[str, Path], tmp_path: Path) -> None:
    connect(book(RecordTo(tmp_path)), films["h264.mp4"], 36 * 3600)
    recording = Recording(tmp_path)  # ends at 00:00:10 two days later
    assert recording.moment("00:00:07.5") == 36 * 3600 + Fraction(15, 2)
    assert recording.moment("23:59") == 36 * 3600 - 60
    assert recording.moment("2026-03-01 12:00:30") == 30
    assert recording.moment("2026-03-01T13:00:30+01:00") == 30
    for wrong in ("yesterday", "25:00", "12:61"):
        with pytest.raises(SettingsError, match="is no time; write 14:02:10"):
            recording.moment(wrong)


@pytest.fixture(scope="module")
def torn(films: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Four connections, of which the third begins before the second has ended."""
    to = RecordTo(tmp_path_factory.mktemp("torn"), segment_seconds=1)
    log = book(to)
    for at, name, count in ((5, "h264.ts", 40), (12, "h264.mp4", 100), (20, "hevc.ts", 60), (40.125, "h264.mkv", 9)):
        connect(log, films[name], at, count)
    log.close()
    return Recording(to.folder)


@settings(max_examples=60, deadline=None)
@given(st.fractions(0, 60, max_denominator=50), st.fractions(Fraction(1, 50), 30, max_denominator=50))
def test_any_span_is_found_as_far_as_it_is_there(torn: Recording, start: Fraction, length: Fraction) -> None:
    stop = start + length
    whole = [(max(a, start), min(b, stop)) for a, b in torn.spans() if max(a, start) < min(b, stop)]
    found: list[tuple[Fraction, Fraction]] = []
    for stretch in torn.find(start, stop):
        assert found == [] or stretch.start >= found[-1][1]
        if found and found[-1][1] == stretch.start:
            found[-1] = found[-1][0], stretch.stop
        else:
            found.append((stretch.start, stretch.stop))
        with av.open(str(stretch.files[0])) as container:
            first = next(container.demux(video=0))
        assert first.is_keyframe and first.pts is not None and first.pts * first.time_base <= stretch.file_start
    assert found == whole


def test_only_the_last_file_of_a_day_is_opened_to_find_a_moment(
    films: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In files of 30 s; the last tells where it ends."""
    connect(book(RecordTo(tmp_path, segment_seconds=60)), films["h264.ts"], 0)
    (one,) = files(tmp_path)
    for k in range(1, 2880):
        os.link(one, one.with_name(f"{k + 1:08d}-{18000 + k * 30 * 90000}-0.mp4"))
    opened: list[Path] = []

    def end(path: Path) -> Fraction:
        opened.append(path)
        return Fraction(86400)

    monkeypatch.setattr(module, "_end_of_file", end)
    recording = Recording(tmp_path)
    (stretch,) = recording.find(14_000, 14_001)
    assert [path.name[:8] for path in opened] == ["00002880"]
    assert [path.name[:8] for path in stretch.files] == ["00000467", "00000468"]


@pytest.mark.slow
def test_an_rtsp_camera_that_dies_and_comes_back_is_recorded(tmp_path: Path) -> None:
    film = pack(tmp_path / "film", [write(tmp_path / "film.ts", even(60), gop=10, noise=20, size=(64, 320))])
    quick = Patience(stall_seconds=3, first_delay=0.1, longest_delay=0.3)
    to = RecordTo(tmp_path / "r", segment_seconds=2)
    shown: list[Frame] = []
    with gst_server(film) as server:
        address = f"rtsp://127.0.0.1:{server.port}/live"
        with Supervised(address, patience=quick, record=to) as watched:
            while len(shown) < 90:
                item = next(watched)
                if not isinstance(item, Frame):
                    continue
                shown.append(item)
                if len(shown) == 45:
                    server.kill()
                    server.start()
            assert watched.connects == 2
    recording = Recording(to.folder)
    assert len(recording.spans()) == 2
    frames = {frame.pts: frame for frame in again(recording, 0, 1000)}
    missed = [frame.pts for frame in shown if frame.pts not in frames]
    assert len(missed) <= 2  # the last packet of each connection
    assert all(torch.equal(frame.pixels, frames[frame.pts].pixels) for frame in shown if frame.pts in frames)
    shutil.rmtree(to.folder)
