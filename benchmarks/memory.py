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
``grow``     2000 spans in 20 batches; after each, ``Bank.index`` and a search that must find the newest span

Keys are made as video makes them: scenes of 40 spans on average, each near one of 400 topics (centres in 96
directions of falling weight), a random walk within the scene, a direction all keys share (mean cosine of
two keys 0.33), a little noise in all directions, and topics that move on by ``--drift`` of their own length
over the whole source.  Queries ``near`` are a remembered key with noise (cosine 0.9), ``far`` ones mostly
noise, as sentences are to pictures (cosine of the best 0.25).  Real keys may be easier or harder.

The files are in the page cache unless they do not fit.  RSS is split into memory of its own and mapped
file pages, which the system takes back when it needs them.  Numbers are of one run on a machine that may
be busy: look at ``load``.  The last line is one JSON object.

::

    python benchmarks/memory.py --sizes 1e4 1e5 1e6 --folder /somewhere/with/10GB
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamvid.memory.bank import Bank
from streamvid.memory.faiss_index import load_faiss, new_index
from streamvid.memory.keys import MemoryKey
from streamvid.tokens import VideoTokens

BATCH = 1000
BLOCK = 50_000
TOPICS = 400
DIRECTIONS = 96
STRAIGHT = 100_000
SINGLE = 300
KEY = MemoryKey(content="made", sampling={}, model="none", processor="none", methods=[], embedder="made")


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


STEPS = {
    "fill": fill,
    "straight": straight,
    "build": build,
    "open": reopen,
    "again": reopen,
    "search": search,
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
    parser.add_argument("--drift", type=float, default=1.0, help="how far topics move, 0 is not at all")
    parser.add_argument("--kind", default="auto", help="of index; auto is by size")
    parser.add_argument("--threads", type=int, default=1, help="of torch and FAISS")
    parser.add_argument("--folder", type=Path, help="where memory is made, and left; default: a temporary one")
    parser.add_argument("--keep", action="store_true", help="use a folder that was filled before")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
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
