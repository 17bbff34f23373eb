"""What storing tokens in fewer bytes costs: answers of the toy model under each codec, errors, bytes and speed.

Three parts:

``answers``   clips the toy model never saw, watched once as a user's are, with every token kept and with the
              default chain, in spans of four temporal patches.  The very tokens of each clip then pass through
              each codec and are given to the model, all of them, with every question that has one right
              answer.  ``same`` is the share of answers equal, letter for letter, to those from fp16; ``right`` is
              the share of answers that are exactly right.  Bytes are those of features and layers, codec headers
              included; ``header`` is the headers' part.
``outliers``  random vectors with the width and the outlier channels of real visual tokens: six dimensions some
              hundreds of times larger than the rest.  ``rest`` is the cosine without these six, which the cosine
              of whole vectors hides.
``speed``     the same vectors, in blocks of 64, one thread, median of ``--repeats``.

``learned`` rows use codebooks from other clips: seeds apart from those asked, every token kept.  ``own`` rows
are what is stored before there is a codebook, ``format 1`` what sq8 was before it could be learned.

Not measured: answers of models of real size.  Their tokens are wider and have outlier channels the toy model's
have not, which is why the second part exists.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from streamvid.memory.bank import Bank
from streamvid.memory.codebooks import Codebooks
from streamvid.memory.codec import PQ_TOKENS, Codec, CodecSetting, FolderCodecs
from streamvid.models.adapter import Adapter
from streamvid.temporal.methods.compose import DEFAULT
from streamvid.tokens import VideoTokens
from streamvid.toy.questions import Question, ask_all
from streamvid.toy.video import write_video
from streamvid.toy.world import sample_scene
from streamvid_pipelines.ask import AskVideo, Loaded, Request, load

FIRST_SEED = 700_000
LEARN_SEED = 710_000
BLOCK = 64
OUTLIERS = 6
ROWS = (
    "fp16", "fp32", "sq8 own", "sq8 learned", "sq8+sq4 own", "sq8+sq4 learned", "sq4 own", "sq4 learned",
    "sq8+pq learned", "pq learned",
)  # fmt: skip


@dataclass
class Row:
    """One codec over one set of clips."""

    answers: list[str] = field(default_factory=list)
    right: int = 0
    size: int = 0
    header: int = 0
    tokens: int = 0
    cosine_error: list[float] = field(default_factory=list)


def watch(seed: int, request: Request, loaded: Loaded, folder: Path) -> tuple[list[VideoTokens], list[Question]]:
    """The spans of a clip, stored without loss, and its questions."""
    scene = sample_scene(seed, seconds=16)
    path = folder / f"{seed}.mp4"
    if not path.exists():
        write_video(scene, path, height=128, width=128, fps=10)
    with Bank.open(folder / f"memory-{request.reduce}", codec="fp32") as bank:
        video = AskVideo(path, request, loaded, bank)
        video.prepare()
        assert video.source is not None
        spans = [(span, span.tokens) for span in bank.spans(video.source.id)]
        return bank.read(spans), ask_all(scene)


def blocks(tokens: VideoTokens) -> list[Tensor]:
    """Features, then each layer."""
    return [tokens.features, *tokens.layers]


def codecs_of(name: str, learned: dict[str, FolderCodecs], width: int, num_layers: int) -> tuple[Codec, ...]:
    """The codecs of a row: features, then each layer."""
    setting, _, how = name.partition(" ")
    folder = learned[setting]
    return folder.of("toy" if how == "learned" else "none", width=width, num_layers=num_layers)


def through(tokens: VideoTokens, codecs: Sequence[Codec], folder: FolderCodecs, row: Row) -> VideoTokens:
    """Tokens as they come back from memory, counted and compared."""
    back = []
    for codec, x in zip(codecs, blocks(tokens), strict=True):
        made = codec.encode(x)
        y = folder.codec(made.codec, made.book).decode(made.header, made.rows, width=x.shape[1])
        row.size += len(made.header) + made.rows.size
        row.header += len(made.header)
        row.cosine_error.append(float((1 - torch.cosine_similarity(x.double(), y.double())).mean()))
        back.append(y.to(x.dtype))
    row.tokens += len(tokens)
    return replace(tokens, features=back[0], layers=tuple(back[1:]))


def answer(adapter: Adapter, tokens: VideoTokens, question: str) -> str:
    """What the model says, greedily."""
    return "".join(adapter.generate(adapter.prompt(tokens, question), max_new_tokens=64)).strip()


def learn(parts: Sequence[VideoTokens], folder: Path, settings: Sequence[str]) -> dict[str, FolderCodecs]:
    """The codecs of every setting, learned from the same tokens."""
    books = Codebooks(folder)
    out = {}
    first = [torch.cat(rows) for rows in zip(*(blocks(p) for p in parts), strict=True)]
    for setting in settings:
        out[setting] = FolderCodecs(CodecSetting.parse(setting), books)
        wanted = out[setting].wanted("toy", width=first[0].shape[1], num_layers=len(first) - 1)
        if wanted > len(first[0]):
            raise SystemExit(f"{setting} learns from {wanted} tokens, got {len(first[0])}; raise --learn-clips")
        out[setting].keep(out[setting].learn("toy", first))
    return out


def measure_answers(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The first part, printed."""
    request = Request(model="toy", reduce="none", threads=args.threads)
    loaded = load(request, lambda text: print(text, file=sys.stderr))
    taught: list[VideoTokens] = []
    for seed in range(LEARN_SEED, LEARN_SEED + args.learn_clips):
        taught += watch(seed, request, loaded, folder)[0]
        if sum(map(len, taught)) >= PQ_TOKENS:
            break
    rows = args.rows.split(",")
    learned = learn(taught, folder / "codebooks", sorted({name.partition(" ")[0] for name in rows}))
    report: dict[str, object] = {"learned_from_clips": seed - LEARN_SEED + 1}
    for chain in ("none", DEFAULT):
        asked = replace(request, reduce=chain)
        found: dict[str, Row] = {name: Row() for name in rows}
        count = spans = 0
        began = time.time()
        for seed in range(FIRST_SEED, FIRST_SEED + args.clips):
            parts, questions = watch(seed, asked, loaded, folder)
            count, spans = count + len(questions), spans + len(parts)
            for name, row in found.items():
                codecs = codecs_of(name, learned, parts[0].features.shape[1], len(parts[0].layers))
                setting = learned[name.partition(" ")[0]]
                tokens = VideoTokens.cat([through(part, codecs, setting, row) for part in parts])
                for item in questions:
                    said = answer(loaded.adapter, tokens, item.question)
                    row.answers.append(said)
                    row.right += said == item.answer
        base = found["fp16"]
        print(
            f"\n{'every token' if chain == 'none' else chain}: {count} answers from {args.clips} clips, "
            f"{base.tokens / spans:.1f} tokens a span, {time.time() - began:.0f} s\n"
        )
        print("| codec | same as fp16 | right | bytes a token | header | 1 - cosine |\n|---|---:|---:|---:|---:|---:|")
        result: dict[str, object] = {"answers": count, "tokens_per_span": base.tokens / spans}
        for name, row in found.items():
            same = sum(a == b for a, b in zip(row.answers, base.answers, strict=True)) / count
            error = statistics.mean(row.cosine_error)
            print(
                f"| {name} | {same * 100:.2f} % | {row.right / count * 100:.2f} % | {row.size / row.tokens:.0f} | "
                f"{row.header / max(1, row.size) * 100:.0f} % | {error:.1e} |"
            )
            result[name] = {
                "same": round(same, 5),
                "right": round(row.right / count, 5),
                "bytes_per_token": round(row.size / row.tokens, 2),
                "header_bytes_per_token": round(row.header / row.tokens, 2),
                "cosine_error": error,
            }
        width, layers = taught[0].features.shape[1], len(taught[0].layers)
        share = 8 * spans / base.tokens
        before = width * (1 + layers) * (share + 1)
        print(f"\nsq8 of format 1: {before:.0f} bytes a token, header {share / (share + 1) * 100:.0f} %")
        result["sq8 format 1 bytes_per_token"] = round(before, 2)
        report[chain] = result
    return report


def outlier_vectors(count: int, width: int, seed: int) -> Tensor:
    """(count, width) float32 that are bfloat16 numbers; the same six dimensions are hundreds of times larger."""
    fixed = torch.Generator().manual_seed(0)
    mean = 0.3 * torch.randn(width, generator=fixed)
    scale = torch.exp(0.5 * torch.randn(width, generator=fixed))
    scale[:OUTLIERS] = 100 + 400 * torch.rand(OUTLIERS, generator=fixed)
    x = mean * scale + scale * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return x.bfloat16().float()


def seconds_of(run: Callable[[], object], repeats: int) -> float:
    """Median, after one run to warm up."""
    run()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def measure_outliers(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The second and third part, printed."""
    torch.set_num_threads(args.threads)
    from streamvid.memory.faiss_index import load_faiss

    load_faiss().omp_set_num_threads(args.threads)
    width = args.width
    first, x = outlier_vectors(PQ_TOKENS, width, 1), outlier_vectors(args.tokens, width, 2)
    parts = torch.split(x, BLOCK)
    report: dict[str, object] = {"width": width, "tokens": len(x)}
    print(f"\noutlier channels: {len(x)} vectors of {width}, {BLOCK} a block\n")
    print("| codec | bytes a token | 1 - cosine | rest | encode tokens/s | decode tokens/s | learned in s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in ("fp16", "fp32", "sq8 own", "sq8 learned", "sq4 own", "sq4 learned", "pq learned"):
        setting, _, how = name.partition(" ")
        codecs = FolderCodecs(CodecSetting.parse(setting), Codebooks(folder / f"outliers-{name}"))
        taken = 0.0
        if how == "learned":
            began = time.perf_counter()
            codecs.keep(codecs.learn("outliers", [first]))
            taken = time.perf_counter() - began
        (codec,) = codecs.of("outliers", width=width, num_layers=0)
        made = [codec.encode(part) for part in parts]

        def decode() -> Tensor:
            return torch.cat([codecs.codec(m.codec, m.book).decode(m.header, m.rows, width=width) for m in made])  # noqa: B023

        y = decode()
        whole = float((1 - torch.cosine_similarity(x.double(), y.double())).mean())
        rest = float((1 - torch.cosine_similarity(x[:, OUTLIERS:].double(), y[:, OUTLIERS:].double())).mean())
        size = sum(len(m.header) + m.rows.size for m in made) / len(x)
        encoding = len(x) / seconds_of(lambda: [codec.encode(part) for part in parts], args.repeats)  # noqa: B023
        decoding = len(x) / seconds_of(decode, args.repeats)
        print(f"| {name} | {size:.0f} | {whole:.1e} | {rest:.1e} | {encoding:,.0f} | {decoding:,.0f} | {taken:.1f} |")
        report[name] = {
            "bytes_per_token": round(size, 2),
            "cosine_error": whole,
            "cosine_error_rest": rest,
            "encode_tokens_per_second": round(encoding),
            "decode_tokens_per_second": round(decoding),
            "learn_seconds": round(taken, 2),
        }
    return report


def main() -> None:
    """Run all parts, print the tables and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=32, help="asked, 16 s each")
    parser.add_argument("--learn-clips", type=int, default=40, help="at most so many clips to learn from")
    parser.add_argument("--rows", default=",".join(ROWS), help="of the first part; fp16 must be among them")
    parser.add_argument("--width", type=int, default=2048, help="of the vectors with outlier channels")
    parser.add_argument("--tokens", type=int, default=4096, help="how many of them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    report: dict[str, object] = {"clips": args.clips, "threads": args.threads}
    with tempfile.TemporaryDirectory() as name:
        if args.clips:
            report["answers"] = measure_answers(args, Path(name))
        report["outliers"] = measure_outliers(args, Path(name))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
