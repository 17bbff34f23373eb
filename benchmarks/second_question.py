"""What a second question costs: cold, in the same process, in a new one, and with kept keys and values.

Rows, each several times in turn:

``cold``            the first question on a fresh memory: decode, encode, remember, answer
``same process``    another question, to the object that answered the first
``new process``     another question from a new process: recall and prefill
``kept``            the same with ``--keep-kv``: the video part is not prefilled again

``transformers``    the cold work by hand, pixels into the model's own ``generate``, for every question
                    again: what there is without a memory

Seconds run from having the model to having the answer, time to the first piece of text is given beside;
starting Python and loading the model are the same for all rows and given apart.  Reduction keeps what the
language model is given the same in all rows: ``none``, so that nothing depends on the question.

Models: ``toy`` is the bundled one.  ``wide`` has random weights in the shape of Qwen3-VL-2B (2048 wide, 16
heads, 8 of them for keys, 151,936 words) with ``--layers`` of its 28 decoder layers and a small vision tower:
seconds of prefill are real per layer, answers mean nothing.  Both write ``--new`` tokens at most.
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
from typing import Any

QUESTIONS = ("what happens?", "how many shapes are there?")
ROWS = ("transformers", "cold", "same process", "new process", "kept")


def make_wide(folder: Path, layers: int) -> None:
    """A checkpoint folder with random weights."""
    import torch
    from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from streamvid.models.checkpoints import toy_folder

    tokenizer = AutoTokenizer.from_pretrained(toy_folder())
    marks = ("<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in marks}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": layers,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
            "max_position_embeddings": 262_144, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 4, "hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "patch_size": 16,
            "out_hidden_size": 2048, "deepstack_visual_indexes": [0, 1, 2],
        },
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    # Buffers (rotary frequencies) have no place in a checkpoint and are made anew when it is loaded.
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {
        "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "size": {"shortest_edge": 4096, "longest_edge": 25_165_824}, "fps": 2,
    }  # fmt: skip
    (folder / "video_preprocessor_config.json").write_text(json.dumps(settings))


def worker(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one process."""
    born = time.perf_counter()
    import torch

    from streamvid.session import peak_rss_bytes
    from streamvid_pipelines.ask import Request, load, open_ask

    torch.set_num_threads(args.threads)
    request = Request(
        model=args.model, embedder="none", reduce="none", memory=args.memory, threads=args.threads, budget=1 << 20,
        max_new_tokens=args.new, keep_kv=args.worker == "kept",
    )  # fmt: skip
    out = []
    if args.worker == "transformers":
        from ask import by_hand

        adapter = load(request, lambda text: None).adapter
        loaded = time.perf_counter() - born
        for question in QUESTIONS:
            out.append(
                {"row": "transformers", "load_seconds": loaded} | by_hand(adapter, args.video, question, args.new)
            )
        return out[1:]
    with open_ask(args.video, request, lambda text: None) as opened:
        loaded = time.perf_counter() - born
        for number, row in enumerate(("cold", "same process") if args.worker == "cold" else (args.worker,)):
            pieces: list[float] = []
            began = time.perf_counter()
            opened.prepare()
            answer = opened.ask(
                QUESTIONS[number if args.worker == "cold" else args.question],
                lambda text, pieces=pieces: pieces.append(time.perf_counter()),
            )
            done = time.perf_counter()
            receipt = answer.receipt
            out.append(
                {
                    "row": row,
                    "load_seconds": loaded,
                    "seconds": done - began,
                    "first_seconds": (pieces[0] if pieces else done) - began,
                    "cache": receipt.cache,
                    "prompt_tokens": receipt.prompt_tokens,
                    "reused_tokens": receipt.reused_tokens,
                    "stages": {cost.name: cost.seconds for cost in receipt.stages},
                    "peak_rss_bytes": peak_rss_bytes(),
                    "answer": answer.text,
                }
            )
    return out


def spawn(row: str, video: Path, memory: Path, model: str, args: argparse.Namespace, question: int) -> list[Any]:
    """Run rows in a new process."""
    command = [
        sys.executable, __file__, "--worker", row, "--video", str(video), "--memory", str(memory), "--model", model,
        "--threads", str(args.threads), "--new", str(args.new), "--question", str(question),
    ]  # fmt: skip
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{row} failed:\n{done.stderr[-3000:]}")
    return list(json.loads(done.stdout.splitlines()[-1]))


def parse() -> argparse.Namespace:
    """Arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="toy,wide")
    parser.add_argument("--layers", type=int, default=6, help="decoder layers of the wide model, of 28")
    parser.add_argument("--seconds", type=int, default=30, help="length of the clip")
    parser.add_argument("--size", default="320x192", help="WIDTHxHEIGHT of the clip")
    parser.add_argument("--new", type=int, default=12, help="longest answer in tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--worker", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--question", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--video", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run all rows in turn, print a table for each model and one JSON line."""
    args = parse()
    if args.worker:
        print(json.dumps(worker(args)))
        return
    report: dict[str, Any] = {
        "seconds_of_video": args.seconds,
        "size": args.size,
        "threads": args.threads,
        "models": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        from streamvid.toy.video import write_video
        from streamvid.toy.world import sample_scene

        width, height = (int(side) for side in args.size.split("x"))
        video = folder / "clip.mp4"
        scene = sample_scene(11, seconds=args.seconds, events=3, clean=True)
        write_video(scene, video, height=height, width=width, fps=25)
        for model in args.models.split(","):
            where = model
            if model == "wide":
                where = str(folder / "wide")
                make_wide(Path(where), args.layers)
            runs: dict[str, list[Any]] = {row: [] for row in ROWS}
            for turn in range(args.repeats):
                memory = folder / f"{model}-{turn}"
                for row, question in (("transformers", 1), ("cold", 0), ("new process", 1), ("kept", 0), ("kept", 1)):
                    done = spawn(row, video, memory, where, args, question)
                    for one in done if (row, question) != ("kept", 0) else []:  # the first only leaves them
                        runs[one["row"]].append(one)
            report["models"][model] = show(model, runs, args)
    print(json.dumps(report))


def show(model: str, runs: dict[str, list[Any]], args: argparse.Namespace) -> dict[str, Any]:
    """The table of one model; returns what it holds."""
    what = f"random weights, {args.layers} of 28 layers" if model == "wide" else "bundled"
    print(f"\n{model} ({what})")
    print(
        f"{'row':14}{'seconds (min-max)':>26}{'first s':>9}{'load s':>8}{'prompt':>8}{'reused':>8}{'RSS MB':>8}  stages"
    )
    rows: dict[str, Any] = {}
    for row, done in runs.items():
        seconds = sorted(float(one["seconds"]) for one in done)
        median = statistics.median(seconds)
        middle = min(done, key=lambda one: abs(float(one["seconds"]) - median))
        first, loading = (statistics.median(float(one[k]) for one in done) for k in ("first_seconds", "load_seconds"))
        stages = ", ".join(f"{k} {v:.2f}" for k, v in middle["stages"].items() if v >= 0.01)
        counts = f"{middle['prompt_tokens']:>8}{middle['reused_tokens']:>8}{middle['peak_rss_bytes'] / 1e6:8.0f}"
        spread = f"{median:.2f} ({seconds[0]:.2f}-{seconds[-1]:.2f})"
        print(f"{row:14}{spread:>26}{first:9.2f}{loading:8.1f}{counts}  {stages}", flush=True)
        rows[row] = middle | {"seconds": median, "first_seconds": first, "spread": [seconds[0], seconds[-1]]}
    answers = {row: told["answer"] for row, told in rows.items() if row != "cold"}
    same = len(set(answers.values())) == 1
    print(f"the second answer is {'the same in every row' if same else f'not the same: {answers}'}")
    base = rows["transformers"]["seconds"]
    print("against transformers: " + ", ".join(f"{row} {base / told['seconds']:.1f}x" for row, told in rows.items()))
    return rows


if __name__ == "__main__":
    main()
