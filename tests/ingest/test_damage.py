"""Files that lie in their headers, and thousands of small damages: nothing crashes, hangs or gives wrong times."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

from streamvid.errors import SourceError
from streamvid.ingest import Sampling, open_source
from streamvid.ingest.probe import survey
from tests.ingest.synthetic import even, write

ROOT = Path(__file__).parents[2]


def claims_frames(data: bytearray) -> None:
    """An MP4 whose tables claim a thousand million pictures of one byte in one chunk."""
    count = 10**9
    struct.pack_into(">II", data, data.index(b"stts") + 8, 1, count)
    struct.pack_into(">II", data, data.index(b"stsz") + 8, 1, count)
    struct.pack_into(">IIII", data, data.index(b"stsc") + 8, 1, 1, count, 1)


def claims_size(data: bytearray) -> None:
    """An AVI whose header claims 2^31 - 1 pixels in each direction."""
    struct.pack_into("<ii", data, data.index(b"strf") + 12, 2**31 - 1, 2**31 - 1)


def claims_duration(data: bytearray) -> None:
    """An MP4 whose media and track headers claim half a year."""
    for box, place in ((b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24)):
        struct.pack_into(">I", data, data.index(box) + place, 2**31 - 1)


PEAK = """
import json, resource, sys
from pathlib import Path
from streamvid.errors import SourceError
from streamvid.ingest.openers import FileOpener
from streamvid.ingest.pyav import PyavReader
from streamvid.ingest.probe import survey
path = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    reader = PyavReader(FileOpener(path, path.name))
    found = survey(reader)
    told = [found.frames, str(found.last), str(reader.info.duration)]
except SourceError as reason:
    told = [str(reason)]
print(json.dumps([told, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


@pytest.mark.parametrize(
    "name, lie, told",
    [
        ("frames.mp4", claims_frames, ["frames.mp4 holds no picture that can be decoded"]),
        ("size.avi", claims_size, [20, "19/10", "2"]),
        ("duration.mp4", claims_duration, [20, "19/10", "2"]),
    ],
)
def test_nothing_is_allocated_because_a_header_says_so(
    tmp_path: Path, name: str, lie: Callable[[bytearray], None], told: list[object]
) -> None:
    codec = {"codec": "mjpeg", "options": {"strict": "-1"}} if name.endswith("avi") else {}
    path = write(tmp_path / name, even(20), **codec)  # type: ignore[arg-type]
    data = bytearray(path.read_bytes())
    lie(data)
    path.write_bytes(data)
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True, cwd=ROOT)
    found, kilobytes = json.loads(done.stdout)
    assert all(str(a).startswith(str(b)) for a, b in zip(found, told, strict=True))
    assert kilobytes < 64 * 1024


def seeds(folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    times = even(24)
    return [
        write(folder / "a.mp4", times),
        write(folder / "b.mp4", times, container={"movflags": "frag_keyframe+empty_moov"}),
        write(folder / "c.mkv", times),
        write(folder / "d.ts", times),
        write(folder / "e.avi", times, codec="mpeg4", bframes=0),
        write(folder / "f.webm", times, codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}),
        write(folder / "g.flv", times),
        write(folder / "h.mov", times, codec="mjpeg", options={"strict": "-1"}),
    ]


def damaged(data: bytes, random_: random.Random) -> bytes:
    """One to three damages: bytes changed, cut out, doubled, zeroed or the end lost; often near the front."""
    out = bytearray(data)
    for _ in range(random_.randint(1, 3)):
        reach = len(out) if random_.random() < 0.6 else min(len(out), 1200)
        at = random_.randrange(reach)
        length = random_.choice((1, 1, 2, 4, 16, 200))
        how = random_.randrange(6)
        if how == 0:
            out[at] ^= 1 << random_.randrange(8)
        elif how == 1:
            out[at : at + length] = random_.randbytes(length)
        elif how == 2:
            del out[at : at + length]
        elif how == 3:
            out[at:at] = out[at : at + length]
        elif how == 4:
            out[at : at + length] = bytes(length)
        elif len(out) > 400:
            del out[random_.randrange(200, len(out)) :]
    return bytes(out)


def check(path: Path, pictures: int) -> str:
    """Read a damaged file in every way and look at the times; the outcome in a word."""
    try:
        with open_source(path, stall_seconds=20) as source:
            found = source.call(survey)
            assert 0 < found.frames <= pictures, "more pictures than were ever put in"
            assert found.first is not None and found.last is not None and found.end is not None
            assert found.first <= found.last < found.end
            start, stop = source.info.start, source.end
            for sampling in (Sampling(count=5), Sampling(fps=3, start=start + (stop - start) / 2)):
                try:
                    frames = list(source.frames(sampling))
                except SourceError:
                    continue
                assert all(a.pts < b.pts for a, b in zip(frames, frames[1:], strict=False))
                assert all(frame.duration > 0 for frame in frames)
            return "read"
    except SourceError as reason:
        assert "\n" not in str(reason)
        assert "decoder fail" not in str(reason), reason.__notes__
        return "crashed" if "crash" in str(reason) else "stalled" if "no progress" in str(reason) else "refused"


def fuzz(folder: Path, rounds: int, seed: int) -> dict[str, int]:
    random_ = random.Random(seed)
    originals = [(path, path.read_bytes()) for path in seeds(folder)]
    outcomes = {"read": 0, "refused": 0, "crashed": 0, "stalled": 0}
    for number in range(rounds):
        path, data = originals[number % len(originals)]
        victim = folder / f"victim-{number}{path.suffix}"
        victim.write_bytes(damaged(data, random_))
        outcomes[check(victim, 2 * 24)] += 1
        victim.unlink()
    return outcomes


def test_small_damage_is_survived(tmp_path: Path) -> None:
    outcomes = fuzz(tmp_path / "files", 80, seed=1)
    assert outcomes["stalled"] == outcomes["crashed"] == 0
    assert outcomes["read"] > 30 and outcomes["refused"] > 0


@pytest.mark.slow
def test_much_small_damage_is_survived(tmp_path: Path) -> None:
    outcomes = fuzz(tmp_path / "files", 800, seed=2)
    assert outcomes["stalled"] == outcomes["crashed"] == 0
    assert outcomes["read"] > 300 and outcomes["refused"] > 10


def test_a_file_that_shrinks_while_it_is_read_ends_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", even(300), noise=40, size=(64, 320))
    with open_source(path) as source:
        taken = source.frames()
        first = next(taken)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 3)
        rest = list(taken)
        assert first.pts == 0 and 0 < len(rest) < 299
        assert all(a.pts < b.pts for a, b in zip(rest, rest[1:], strict=False))
        assert [frame.pts for frame in rest] == [Fraction(k + 1, 10) for k in range(len(rest))]
