"""What one question costs: transformers' own path against streamvid, cold and warm, on the same clip.

Measures, each in a process of its own and several times in turn:

``transformers``   every picture decoded by PyAV, sampled by index, prepared and given to the model's
                   own ``generate`` with pixels: what one writes by hand from the model card
``keep all``       ``streamvid ask --reduce none`` on a fresh memory
``default``        ``streamvid ask`` with the default chain on a fresh memory
``second``         the same again in a new process, another question, the memory of ``default``

Seconds run from having a loaded model to having the answer; start of the interpreter and loading
of the model are the same for all and given apart.  Peak RSS is the whole process.  The clip is a
toy scene with a still camera, rendered here.  Real processors need torchvision, which has no build
beside the CPU build of torch 2.13, so the ``transformers`` row prepares pixels with our function,
which equals the real one's output.

Not measured: answer quality (see ``streamvid_pipelines.measure_toy``) and models of real size: the
toy model makes decoding of the video a larger share than it is for a model of billions of parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUESTIONS = ("what happens?", "how many shapes are there?")
ROWS = ("transformers", "keep all", "default", "second")


def worker(row: str, video: Path, memory: Path, threads: int) -> dict[str, object]:
    """Run one row in this process."""
    born = time.perf_counter()
    import torch

    from streamvid_pipelines.ask import Request, load, open_ask

    torch.set_num_threads(threads)
    settings = "none" if row in ("transformers", "keep all") else Request().reduce
    request = Request(model="toy", reduce=settings, memory=memory, threads=threads, budget=1 << 20)
    out: dict[str, object] = {"row": row}
    if row == "transformers":
        loaded = load(request, lambda text: None)
        out["load_seconds"] = time.perf_counter() - born
        out |= by_hand(loaded.adapter, video, QUESTIONS[0], 256)
    else:
        with open_ask(video, request, lambda text: None) as opened:
            out["load_seconds"] = time.perf_counter() - born
            began = time.perf_counter()
            opened.prepare()
            answer = opened.ask(QUESTIONS[row == "second"])
            out["seconds"] = time.perf_counter() - began
            receipt = answer.receipt
            out |= {
                "answer": answer.text,
                "tokens_given": receipt.tokens_given,
                "tokens_encoded": receipt.tokens_encoded,
                "frames_encoded": receipt.frames_encoded,
                "cache": receipt.cache,
                "stages": {cost.name: cost.seconds for cost in receipt.stages},
            }
    from streamvid.session import peak_rss_bytes

    out["peak_rss_bytes"] = peak_rss_bytes()
    return out


def by_hand(adapter: object, video: Path, question: str, new: int) -> dict[str, object]:
    """The model card's way: decode all, sample by index, pixels in, ``generate`` at most ``new`` tokens."""
    from fractions import Fraction

    import av
    import torch

    from streamvid.frames import Clip
    from streamvid.models.qwen_vl import Qwen3VL

    assert isinstance(adapter, Qwen3VL)
    model, tokenizer = adapter.model, adapter.tokenizer
    stages: dict[str, float] = {}
    began = mark = time.perf_counter()
    with av.open(str(video)) as container:
        rate = container.streams.video[0].average_rate
        assert rate is not None
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    step = rate / Fraction(adapter.pixels.fps)
    chosen = [pictures[int(i * step)] for i in range(int(len(pictures) / step))]
    del pictures
    pixels = torch.stack([torch.from_numpy(p) for p in chosen])
    stages["decode video"], mark = time.perf_counter() - mark, time.perf_counter()
    times = tuple(Fraction(i, 2) for i in range(len(pixels)))
    clip = Clip(pixels, times, (Fraction(1, 2),) * len(pixels))
    size = adapter.frame_size(height=pixels.shape[1], width=pixels.shape[2], num_frames=len(pixels))
    view = adapter.view(clip, size=size)
    grid = torch.tensor(
        [[view.grid[0], view.grid[1] * adapter.pixels.merge_size, view.grid[2] * adapter.pixels.merge_size]]
    )
    patches = adapter.pixels.patchify(view.pixels)
    opening, pad, closing = (tokenizer.decode([i]) for i in adapter._marks())
    per_frame = view.grid[1] * view.grid[2]
    frames = "".join(adapter.stamp(t, 1.0) + opening + pad * per_frame + closing for t in range(view.grid[0]))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=False,
    ).replace(opening + pad + closing, frames)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    stages["prepare"], mark = time.perf_counter() - mark, time.perf_counter()
    with torch.inference_mode():
        made = model.generate(
            input_ids=ids,
            pixel_values_videos=patches,
            video_grid_thw=grid,
            mm_token_type_ids=(ids == model.config.video_token_id).int() * 2,
            max_new_tokens=new,
            do_sample=False,
        )
    stages["generate"] = time.perf_counter() - mark
    answer = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    tokens = view.grid[0] * per_frame
    from streamvid.session import peak_rss_bytes

    return {
        "seconds": time.perf_counter() - began,
        "first_seconds": time.perf_counter() - began,
        "prompt_tokens": ids.shape[1],
        "reused_tokens": 0,
        "peak_rss_bytes": peak_rss_bytes(),
        "answer": answer.strip(),
        "tokens_given": tokens,
        "tokens_encoded": tokens,
        "frames_encoded": len(pixels),
        "cache": "none",
        "stages": stages,
    }


def spawn(row: str, video: Path, memory: Path, threads: int) -> dict[str, object]:
    """Run one row in a new process."""
    command = [
        sys.executable,
        __file__,
        "--worker",
        row,
        "--video",
        str(video),
        "--memory",
        str(memory),
        "--threads",
        str(threads),
    ]
    environment = os.environ | {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
    }
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{row} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"process_seconds": time.perf_counter() - began}


def main() -> None:
    """Run all rows in turn, print the table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=120, help="length of the clip")
    parser.add_argument("--size", default="640x360", help="WIDTHxHEIGHT of the clip")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--worker", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--video", type=Path, help="a clip of yours instead of the rendered one")
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker, args.video, args.memory, args.threads)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        video = args.video
        if video is None:
            from streamvid.toy.video import write_video
            from streamvid.toy.world import sample_scene

            width, height = (int(side) for side in args.size.split("x"))
            video = folder / "clip.mp4"
            write_video(
                sample_scene(11, seconds=args.seconds, events=3, clean=True), video, height=height, width=width, fps=25
            )
        runs: dict[str, list[dict[str, object]]] = {row: [] for row in ROWS}
        for turn in range(args.repeats):
            for row in ROWS:
                memory = folder / f"{'default' if row == 'second' else row}-{turn}"
                runs[row].append(spawn(row, video, memory, args.threads))
    report: dict[str, object] = {
        "seconds_of_video": args.seconds,
        "size": args.size,
        "threads": args.threads,
        "rows": {},
    }
    print(f"{'row':14}{'seconds (min-max)':>26}{'load s':>8}{'tokens':>8}{'encoded':>9}{'RSS MB':>8}  stages")
    for row, done in runs.items():
        seconds = sorted(float(str(r["seconds"])) for r in done)
        median = statistics.median(seconds)
        middle = min(done, key=lambda r: abs(float(str(r["seconds"])) - median))
        stages = middle["stages"]
        assert isinstance(stages, dict)
        shown = ", ".join(f"{k} {v:.2f}" for k, v in stages.items() if v >= 0.01)
        loading = statistics.median(float(str(r["load_seconds"])) for r in done)
        rss = max(int(str(r["peak_rss_bytes"])) for r in done)
        spread = f"{median:.2f} ({seconds[0]:.2f}-{seconds[-1]:.2f})"
        counts = f"{middle['tokens_given']:>8}{middle['tokens_encoded']:>9}"
        print(f"{row:14}{spread:>26}{loading:8.1f}{counts}{rss / 1e6:8.0f}  {shown}")
        assert isinstance(report["rows"], dict)
        report["rows"][row] = {
            "seconds": median,
            "spread": [seconds[0], seconds[-1]],
            "load_seconds": loading,
            "stages": stages,
            "tokens_given": middle["tokens_given"],
            "tokens_encoded": middle["tokens_encoded"],
            "peak_rss_bytes": rss,
            "answer": middle["answer"],
        }
    rows = report["rows"]
    assert isinstance(rows, dict)
    base = rows["transformers"]["seconds"]
    report["times_faster_than_transformers"] = {row: round(base / rows[row]["seconds"], 2) for row in ROWS}
    report["second_against_cold"] = round(rows["default"]["seconds"] / rows["second"]["seconds"], 2)
    faster = report["times_faster_than_transformers"]
    assert isinstance(faster, dict)
    print(f"against transformers: keep all {faster['keep all']}x, default {faster['default']}x")
    print(f"second question: {report['second_against_cold']}x faster than the first")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
