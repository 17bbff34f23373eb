"""What searching a large memory costs: storing, building, opening, searching and growing, at several sizes.

For each size a memory folder is filled with one source of so many spans, one key of ``--width`` numbers
each, through the catalogue's own tables; no tokens are stored, as search reads none.  Each step then
runs in a process of its own, so that memory and caches of one do not help the next:

``fill``     spans a second in transactions of 1000, and through ``Writer.append``, each on the disk before the next
``straight`` keys a second into the index alone, without a catalogue (at most 100,000), training included
``build``    ``Bank.index`` where there is no saved index: from the catalogue, trained, saved
``open``     ``Bank.index`` where there is one: the first time its digest is checked, ``again`` that is remembered
``search``   milliseconds for the 10 best: median and 99th percentile of ``--queries`` of each sort, index warm,
             recall@10 against exact comparison with every key, and the time of that comparison
``recall``   milliseconds of a question before tokens are read, median of 12, the index warm: all spans as
             columns, their similarity, the choice of ``--budget`` of them by hybrid, their records
``grow``     2000 spans in 20 batches; after each, ``Bank.index`` and a search that must find the newest span

Keys are made as video makes them: scenes of 40 spans on average, each near one of 400 topics (centres in 96
directions of falling weight), a random walk within the scene, a direction all keys share (mean cosine of
two keys 0.33), a little noise in all directions, and topics that move on by ``--drift`` of their own length
over the whole source.  Queries ``near`` are a remembered key with noise (cosine 0.9), ``far`` ones mostly
noise, as sentences are to pictures (cosine of the best 0.25).  Real keys may be easier or harder.

The files are in the page cache unless they do not fit.  RSS is split into memory of its own and mapped
file pages, which the system takes back when it needs them.  Numbers are of one run on a machine that may
be busy: look at ``load``.  The last line is one JSON object.

``--sizes-table`` measures nothing of this and prints what an hour of video takes instead: MB of segment files for
each codec, each of ``--chains`` and each family of model widths.  How many tokens and spans a chain leaves is
measured: drawn videos, and the real ones of ``--videos`` where that folder is, are watched at ``--fps`` with
the toy checkpoint, its frames enlarged to about ``--patch-tokens`` tokens a temporal patch, so that a cell is
as large a part of the picture as in a pretrained model; the share that is kept is then taken of exactly so
many.  120 is what Qwen3-VL's processor gives a 16:9 video of an hour, 256 a 16 x 16 grid.  Each video is decoded
once, and each of its clips encoded once for chains that leave the same cells to the tower.  Bytes are exact
(`streamvid.memory.sizes`); the catalogue's copy of the keys comes to them.  Shares are the toy tower's: FastVID
looks at features, and a pretrained tower's may make it keep less, never more than its ratio.

::

    python benchmarks/memory.py --sizes 1e4 1e5 1e6 --folder /somewhere/with/10GB
    python benchmarks/memory.py --sizes-table
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from streamvid.frames import Clip
from streamvid.ingest.clips import clips
from streamvid.ingest.sampling import Sampling
from streamvid.ingest.source import open_source
from streamvid.memory import sizes
from streamvid.memory.bank import Bank
from streamvid.memory.faiss_index import load_faiss, new_index
from streamvid.memory.keys import MemoryKey
from streamvid.memory.writer import Writer
from streamvid.models.adapter import Encoded
from streamvid.models.checkpoints import toy_folder
from streamvid.models.qwen_vl import Qwen3VL
from streamvid.receipt import Receipt
from streamvid.recollection import Recollection
from streamvid.session import Session
from streamvid.signals import Signals
from streamvid.temporal.methods.base import PixelView
from streamvid.temporal.methods.compose import DEFAULT, Chain
from streamvid.temporal.methods.memory.hybrid import Hybrid
from streamvid.tokens import VideoTokens
from streamvid.toy.video import write_video
from streamvid.toy.world import needle_scene

BATCH = 1000
BLOCK = 50_000
TOPICS = 400
DIRECTIONS = 96
STRAIGHT = 100_000
SINGLE = 300
KEY = MemoryKey(content="made", sampling={}, model="none", processor="none", methods=[], embedder="made")

CLIP_FRAMES = 32
SPAN_FRAMES = 4
CHAINS = ("none", "rlt", "fastvid", DEFAULT, "rlt,fastvid:keep_ratio=0.1", "rlt,fastvid:keep_ratio=0.02")
DRAWN = {"one short event, still scene, drawn": "static", "one short event, busy scene, drawn": "busy"}
REAL = {
    "fixed camera, mostly empty": ("flies_arena_120s.mp4", "one_by_one_person.mp4", "car_detection.mp4"),
    "fixed camera, always something moving": ("vtest_360p.avi", "mouse_openfield.mp4"),
    "camera moves, films": (
        "bbb_480p_30s.mp4", "shots_testvideo.mp4", "rooftop_pan_320x240.mp4", "cockatoo.mp4", "toy_crystal.webm",
        "flipping_a_pancake.mkv",
    ),
}  # fmt: skip
"""Files of at least ten seconds: of shorter ones the first patch, which is always new, is too large a share."""


def video_keys(count: int, width: int, *, drift: float, seed: int = 0) -> Iterator[np.ndarray]:
    """Blocks of unit keys (M, width) float32; see the top."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((width, min(width, DIRECTIONS))))[0].T.astype(np.float32)
    weight = (1 / np.sqrt(1 + np.arange(len(axes)))).astype(np.float32)
    weight /= np.linalg.norm(weight)

    def spread(*shape: int) -> np.ndarray:
        return rng.standard_normal((*shape, len(axes)), dtype=np.float32) * weight

    topics, later = spread(TOPICS), spread(TOPICS)
    shared = rng.standard_normal(width, dtype=np.float32)
    shared *= 0.8 / np.linalg.norm(shared)
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        scene = np.repeat(np.arange(size), rng.geometric(1 / 40, size))[:size]
        scenes = scene[-1] + 1
        topic = rng.integers(0, TOPICS, scenes)
        centre = topics[topic] + drift * first / count * later[topic] + 0.5 * spread(scenes)
        walk = np.cumsum(0.08 * spread(size), axis=0)
        walk -= walk[np.searchsorted(scene, np.arange(scenes))][scene]
        keys = (centre[scene] + walk) @ axes + shared
        keys += 0.1 / width**0.5 * rng.standard_normal((size, width), dtype=np.float32)
        yield keys / np.linalg.norm(keys, axis=1, keepdims=True)


def questions(keys: np.ndarray, *, seed: int) -> dict[str, np.ndarray]:
    """Unit queries of both sorts, one for each of some remembered keys (Q, width)."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(keys.shape, dtype=np.float32) / keys.shape[1] ** 0.5
    made = {"near": keys + 0.5 * noise, "far": 0.3 * keys + noise}
    return {name: value / np.linalg.norm(value, axis=1, keepdims=True) for name, value in made.items()}


def store(bank: Bank, source_id: int, first: int, keys: np.ndarray) -> None:
    """Spans with one key each, in one transaction, as `Catalog.add_span` enters them."""
    catalog = bank._catalog
    with catalog.transaction():
        for number, key in enumerate(keys, first):
            added = catalog.execute(
                "INSERT INTO spans (source_id, ordinal, start, stop, start_seconds, stop_seconds, tokens, file, "
                "offset, bytes, grid, codec) VALUES (?, ?, ?, ?, ?, ?, 1, '000000.seg', 0, 1, '[1, 1, 1]', 'fp16')",
                source_id, number, str(number), str(number + 1), float(number), float(number + 1),
            )  # fmt: skip
            catalog.execute(
                "INSERT INTO keys (span_id, width, vectors) VALUES (?, ?, ?)", added.lastrowid, len(key), key.tobytes()
            )


def fill(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Spans and keys into the catalogue."""
    spent, done = 0.0, 0
    with Bank.open(folder) as bank:
        source = bank._catalog.add_source(KEY, path="made", name="made")
        for block in video_keys(args.size, args.width, drift=args.drift):
            began = time.perf_counter()
            for first in range(0, len(block), BATCH):
                store(bank, source.id, done + first, block[first : first + BATCH])
            spent += time.perf_counter() - began
            done += len(block)
    with tempfile.TemporaryDirectory(dir=folder.parent) as other, Bank.open(Path(other)) as bank:
        block = next(video_keys(SINGLE, args.width, drift=0))
        with bank.writer(KEY, path="made", name="made") as writer:
            began = time.perf_counter()
            for number, key in enumerate(block):
                writer.append(
                    token(), start=Fraction(number), stop=Fraction(number + 1), keys=torch.from_numpy(key)[None]
                )
            single = SINGLE / (time.perf_counter() - began)
    return {"spans_per_second": done / spent, "one_by_one_per_second": single}


def token() -> VideoTokens:
    """The least a span can hold."""
    return VideoTokens(
        features=torch.ones(1, 8), layers=(), grid=(1, 1, 1), position=torch.zeros(1, 3, dtype=torch.int64),
        pts_seconds=torch.zeros(1, dtype=torch.float64), duration_seconds=torch.ones(1, dtype=torch.float64),
        size=torch.ones(1), score=torch.ones(1),
    )  # fmt: skip


def straight(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Keys into an index that has no catalogue."""
    index, spent, done = new_index("ivf" if args.kind == "auto" else args.kind, args.width), 0.0, 0
    for block in video_keys(min(args.size, STRAIGHT), args.width, drift=args.drift):
        began = time.perf_counter()
        for first in range(0, len(block), BATCH):
            part = torch.from_numpy(block[first : first + BATCH])
            index.add(torch.arange(done + first, done + first + len(part)), part)
        spent += time.perf_counter() - began
        done += len(block)
    return {"keys_per_second": done / spent, "keys": done}


def build(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """An index from the catalogue."""
    shutil.rmtree(folder / "index", ignore_errors=True)
    with Bank.open(folder) as bank:
        bank._catalog.execute("DELETE FROM snapshots")
        began = time.perf_counter()
        index = bank.index(1, kind=args.kind)
        return {"seconds": time.perf_counter() - began, "said": index.said, "note": index.note}


def reopen(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """An index from its file."""
    began = time.perf_counter()
    with Bank.open(folder) as bank:
        index = bank.index(1, kind=args.kind)
        seconds = time.perf_counter() - began
        index.search(torch.ones(args.width), 10)
        return {"seconds": seconds, "with_search": time.perf_counter() - began, "note": index.note}


def search(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Searches, beside exact comparison with every key."""
    result: dict[str, Any] = {}
    with Bank.open(folder) as bank:
        index = bank.index(1, kind=args.kind)
        some = index.ids()[torch.linspace(0, len(index.ids()) - 1, args.queries).long()]
        asked = questions(bank._catalog.keys_of(some, width=args.width)[1].numpy(), seed=1)
        for name, queries in asked.items():
            for query in queries[:5]:
                index.search(torch.from_numpy(query), 10)
            found, times = [], []
            for query in queries:
                began = time.perf_counter()
                ids, _ = index.search(torch.from_numpy(query), 10)
                times.append(1000 * (time.perf_counter() - began))
                found.append(ids)
            result[name] = {"p50_ms": float(np.median(times)), "p99_ms": float(np.quantile(times, 0.99)), "ids": found}
        result["memory"] = memory()
        began = time.perf_counter()
        best = {name: (torch.empty(0, args.queries), torch.empty(0, args.queries).long()) for name in asked}
        for ids, keys in bank._catalog.keys_after([1], width=args.width):
            for name, queries in asked.items():
                old, old_ids = best[name]
                every = torch.cat([old, keys @ torch.from_numpy(queries).T])
                every_ids = torch.cat([old_ids, ids[:, None].expand(-1, args.queries)])
                top = every.topk(min(10, len(every)), dim=0)
                best[name] = (top.values, every_ids.gather(0, top.indices))
        result["exact_scan_seconds_from_catalogue"] = time.perf_counter() - began
        for name in asked:
            pairs = zip(result[name].pop("ids"), best[name][1].T, strict=True)
            hits = [len(set(ids.tolist()) & set(true.tolist())) / len(true) for ids, true in pairs]
            result[name] |= {"recall_at_10": float(np.mean(hits)), "best_cosine": float(best[name][0][0].mean())}
    return result


def recall(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What a question costs before any token is read: all spans as columns, their similarity, what hybrid chooses."""
    times: dict[str, list[float]] = {"columns": [], "similarity": [], "choose": [], "records": []}
    rows = 0
    with Bank.open(folder) as bank:
        index = bank.index(1, kind=args.kind)
        some = index.ids()[torch.linspace(0, len(index.ids()) - 1, 12).long()]
        asked = torch.from_numpy(questions(bank._catalog.keys_of(some, width=args.width)[1].numpy(), seed=2)["far"])
        receipt = Receipt()
        for query in asked / asked.norm(dim=1, keepdim=True):
            marks = [time.perf_counter()]
            seen = Recollection(bank, bank.sources()[0], receipt)
            marks.append(time.perf_counter())
            seen.ask_for(query)
            marks.append(time.perf_counter())
            counts = Hybrid().recall(seen.view, args.budget, Signals(question=query))
            marks.append(time.perf_counter())
            rows = len(seen.records(counts.nonzero().squeeze(1)))
            marks.append(time.perf_counter())
            for name, began, ended in zip(times, marks, marks[1:], strict=False):
                times[name].append(1000 * (ended - began))
        told: dict[str, Any] = {f"{name}_ms": float(np.median(spent)) for name, spent in times.items()}
        return {**told, "first_ms": sum(spent[0] for spent in times.values()), "spans": rows, "memory": memory()}


def grow(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Storing and searching in turns."""
    times = []
    with Bank.open(folder) as bank:
        bank.index(1, kind=args.kind)
        start = bank._catalog.scope_size([1])[0]
        fresh = next(video_keys(2000, args.width, drift=0, seed=start))
        for first in range(0, 2000, 100):
            store(bank, 1, start + first, fresh[first : first + 100])
            began = time.perf_counter()
            ids, similarity = bank.index(1, kind=args.kind).search(torch.from_numpy(fresh[first + 99]), 10)
            times.append(1000 * (time.perf_counter() - began))
            assert int(ids[0]) == bank._catalog.scope_size([1])[1] and abs(float(similarity[0]) - 1) < 1e-5
    return {"p50_ms": float(np.median(times)), "max_ms": max(times)}


class Once(Qwen3VL):
    """The toy model with a larger grid, which prepares and encodes each clip once for all that show it the same."""

    _clip: Clip | None = None
    _view: PixelView | None = None
    _made: tuple[PixelView, Encoded] | None = None

    def view(self, clip: Clip, *, size: tuple[int, int]) -> PixelView:
        """The clip as the vision tower will see it."""
        if self._view is None or self._clip is not clip:
            self._clip, self._view = clip, super().view(clip, size=size)
        return self._view

    def encode(self, view: PixelView, times: Sequence[tuple[float, float]], *, keep: Tensor | None) -> Encoded:
        """Run the vision tower over the kept cells."""
        if self._made is None or self._made[0] is not view:
            self._made = (view, super().encode(view, times, keep=keep))
        return self._made[1]


class Counted:
    """Stands in for a writer: counts what it is given to store."""

    def __init__(self) -> None:
        self.tokens = self.spans = 0

    def append(self, tokens: VideoTokens, **_: object) -> None:
        """Count one span."""
        self.tokens, self.spans = self.tokens + len(tokens), self.spans + 1


def enlarged(patch_tokens: int) -> Once:
    """The toy checkpoint with frames of up to so many tokens."""
    cast(Any, logging).disable_progress_bar()
    model = cast(Once, Once.load(toy_folder(), name="toy", device="cpu", dtype="auto"))
    most = patch_tokens * model.pixels.cell**2
    model.pixels = replace(model.pixels, max_video_tokens=patch_tokens, longest_edge=1_000_000 * most)
    return model


def kept_of(path: Path, model: Once, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """For each chain the share of tokens kept and of spans that are stored at all."""
    models: dict[str, Once] = {}
    chains: Sequence[str] = args.chains
    counted = {text: Counted() for text in chains}
    total = spans = 0
    with tempfile.TemporaryDirectory() as folder, Bank.open(Path(folder)) as bank, open_source(path) as source:
        sessions = {}
        for text in chains:
            chain = Chain.parse(text)
            cells = json.dumps(Chain(chain.pixel).describe())  # what the tower sees depends on these methods alone
            if cells not in models:
                models[cells] = copy.copy(model)  # the same weights; what it remembers of the stream is its own
            sessions[text] = Session(models[cells], bank, chain=chain, span_frames=SPAN_FRAMES)
            sessions[text].start(height=source.info.height, width=source.info.width, num_frames=2)
        for clip in clips(source.frames(Sampling(fps=args.fps)), CLIP_FRAMES):
            for text, session in sessions.items():
                receipt = Receipt(source=path.name, model="toy")
                writer = cast(Writer, counted[text])
                session.watch(clip, writer, receipt, interval=1 / Fraction(args.fps).limit_denominator(1000))
            total += receipt.tokens_seen
            spans += -(-len(clip) // (2 * SPAN_FRAMES))
    return {text: (seen.tokens / total, seen.spans / spans) for text, seen in counted.items()}


def videos(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path]]:
    """Kind and file of each video, drawn ones first."""
    for kind, distractors in DRAWN.items():
        for seed in range(args.drawn):
            scene, _ = needle_scene(seed, seconds=args.seconds, distractors=distractors)
            yield kind, write_video(scene, folder / f"{distractors}{seed}.mp4", fps=2)
    for kind, names in REAL.items():
        for name in names:
            if (args.videos / name).is_file():
                yield kind, args.videos / name


def percent(share: float) -> str:
    """A share for people."""
    return f"{100 * share:.0f} %" if share > 0.0995 else f"{100 * share:.1f} %"


def sizes_table(args: argparse.Namespace) -> None:
    """What an hour of video takes: codec x chain x family."""
    per_hour = 3600 * args.fps / 2  # temporal patches
    shares: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    began, model = time.perf_counter(), enlarged(args.patch_tokens)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for kind, path in videos(args, Path(folder)):
            seen = shares.setdefault(kind, {})[path.name] = kept_of(path, model, args)
            said = ", ".join(f"{text} {percent(tokens)}" for text, (tokens, _) in seen.items())
            print(f"{time.perf_counter() - began:4.0f} s  {path.name}: {said}", file=sys.stderr)
    rows = []
    for kind, several in shares.items():
        for text in args.chains:
            tokens, spans = (float(np.mean([one[text][place] for one in several.values()])) for place in (0, 1))
            an_hour = {
                "tokens_per_hour": round(tokens * per_hour * args.patch_tokens),
                "spans_per_hour": max(1, round(spans * per_hour / SPAN_FRAMES)),
            }
            megabytes = {codec: sizes.by_family(codec, **an_hour) for codec in sizes.SHOWN}
            kept = {name: round(one[text][0], 5) for name, one in several.items()}
            rows.append({"video": kind, "chain": text, "kept": kept, **an_hour, "megabytes": megabytes})
    print(f"tokens an hour at {args.fps:g} fps, {args.patch_tokens} a temporal patch; share kept; spans an hour\n")
    print("| video | " + " | ".join(args.chains) + " |\n|---|" + "---:|" * len(args.chains))
    whole = per_hour * args.patch_tokens
    for kind in shares:
        cells = [
            f"{r['tokens_per_hour']:,} ({percent(r['tokens_per_hour'] / whole)}; {r['spans_per_hour']})"
            for r in rows
            if r["video"] == kind
        ]
        print(f"| {kind} ({len(shares[kind])}) | " + " | ".join(cells) + " |")
    for text in args.chains:
        mine = [r["megabytes"] for r in rows if r["chain"] == text]
        print(f"\nMB an hour, {text}: from the video that leaves least to the one that leaves most\n")
        print("| codec | " + " | ".join(sizes.FAMILIES) + " |\n|---|" + "---:|" * len(sizes.FAMILIES))
        for codec in sizes.SHOWN:
            found = [[one[codec][family] for one in mine] for family in sizes.FAMILIES]
            cells = [f"{min(f):.1f}" + (f" to {max(f):.1f}" if max(f) > min(f) else "") for f in found]
            print(f"| {codec} | " + " | ".join(cells) + " |")
    settings = {"fps": args.fps, "patch_tokens": args.patch_tokens, "seconds": time.perf_counter() - began}
    print(json.dumps({"benchmark": "memory sizes", **settings, "load": os.getloadavg()[0], "rows": rows}))


STEPS = {
    "fill": fill,
    "straight": straight,
    "build": build,
    "open": reopen,
    "again": reopen,
    "search": search,
    "recall": recall,
    "grow": grow,
}


def memory() -> dict[str, int]:
    """Bytes this process holds: of its own, of mapped files, and its peak."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(status[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return {"own": own, "mapped": mapped, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def step(name: str, folder: Path, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """One step in a process of its own."""
    command = [sys.executable, __file__, "--step", name, "--folder", str(folder), "--sizes", str(size)]
    for option in ("width", "queries", "drift", "kind", "threads"):
        command += [f"--{option}", str(getattr(args, option))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}
    print(f"{size:>9,}  {name:8}  {shown}", flush=True)
    return result


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=float, default=[1e4, 1e5], help="spans")
    parser.add_argument("--width", type=int, default=768, help="numbers in a key")
    parser.add_argument("--queries", type=int, default=100, help="of each sort")
    parser.add_argument("--budget", type=int, default=500, help="spans that recall chooses, of a token each")
    parser.add_argument("--drift", type=float, default=1.0, help="how far topics move, 0 is not at all")
    parser.add_argument("--kind", default="auto", help="of index; auto is by size")
    parser.add_argument("--threads", type=int, default=1, help="of torch and FAISS")
    parser.add_argument("--folder", type=Path, help="where memory is made, and left; default: a temporary one")
    parser.add_argument("--keep", action="store_true", help="use a folder that was filled before")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    table = parser.add_argument_group("what an hour takes")
    table.add_argument("--sizes-table", action="store_true", help="print it, and nothing else")
    table.add_argument("--chains", nargs="+", default=CHAINS, help="reductions, as in --reduce")
    table.add_argument("--patch-tokens", type=int, default=120, help="before reduction, of a temporal patch")
    table.add_argument("--fps", type=float, default=1.0, help="frames a second that are watched")
    table.add_argument("--drawn", type=int, default=1, help="drawn videos of each kind")
    table.add_argument("--seconds", type=int, default=600, help="length of a drawn video")
    table.add_argument(
        "--videos", type=Path, default=Path(__file__).parents[2] / "shared/videos/natural", help="of the real ones"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.sizes_table:
        sizes_table(args)
        return
    if args.step:
        load_faiss().omp_set_num_threads(args.threads)
        args.size = int(args.sizes[0])
        result = STEPS[args.step](args.folder, args)
        print(json.dumps(result if "memory" in result else result | {"memory": memory()}))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for size in map(int, args.sizes):
            folder = (args.folder or Path(temporary)) / str(size)
            row: dict[str, Any] = {"size": size}
            for name in STEPS:
                if not (args.keep and name == "fill"):
                    row[name] = step(name, folder, size, args)
                if name == "build":
                    saved = folder / "index"
                    row["bytes"] = {
                        "catalogue": sum(p.stat().st_size for p in folder.glob("catalog.sqlite3*")),
                        "index": sum(p.stat().st_size for p in saved.iterdir()) if saved.is_dir() else 0,
                    }
                    print(f"{size:>9,}  bytes     {row['bytes']}", flush=True)
            rows.append(row)
    machine = {
        "cpus": os.cpu_count(),
        "threads": args.threads,
        "load": os.getloadavg()[0],
        "machine": platform.machine(),
    }
    settings = {"width": args.width, "kind": args.kind, "drift": args.drift}
    print(json.dumps({"benchmark": "memory", **settings, **machine, "rows": rows}))


if __name__ == "__main__":
    main()
