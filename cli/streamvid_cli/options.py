"""Options that several commands share, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Option(
        envvar="STREAMVID_MODEL",
        help="Model: a checkpoint folder, a repository name, 'auto' (largest known one that fits, from the cache if "
        "it is there) or 'toy' (bundled, knows coloured shapes only).",
    ),
]
Embedder = Annotated[
    str,
    typer.Option(
        envvar="STREAMVID_EMBEDDER",
        help="Image-text encoder that finds moments for a question: 'auto' (cached SigLIP or CLIP), 'none', a folder "
        "or a cached repository.",
    ),
]
Device = Annotated[
    str, typer.Option(envvar="STREAMVID_DEVICE", help="Where models run: auto, cpu, cuda, cuda:1 or mps.")
]
Dtype = Annotated[
    str, typer.Option(help="Weights: auto (as the checkpoint says, float32 on a CPU), float32, bfloat16 or float16.")
]
Fps = Annotated[
    float | None,
    typer.Option(help="Frames a second to look at; more sees more and costs more. Default: the model's own."),
]
MaxFrames = Annotated[
    int | None, typer.Option(help="Never more frames than this; the rate is lowered to fit. Default: the model's own.")
]
From = Annotated[
    str | None, typer.Option("--from", help="Start of the span to watch, in seconds or as [h:]mm:ss.", metavar="TIME")
]
To = Annotated[
    str | None, typer.Option("--to", help="End of the span to watch, not included, like --from.", metavar="TIME")
]
Sample = Annotated[
    str,
    typer.Option(
        help="How frames are chosen: fps (evenly), keys (key frames only: fastest) or adaptive (few where nothing "
        "changes; --fps is then the least)."
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(help="Pictures a second for what has no times of its own: images, raw H.264 and HEVC."),
]
Decoder = Annotated[
    str,
    typer.Option(envvar="STREAMVID_DECODER", help="auto, pyav, torchcodec or decord (the last two are extras)."),
]
Hwaccel = Annotated[
    str | None,
    typer.Option(help="Decode with this hardware (cuda, qsv, ...); where it cannot, the receipt says so."),
]
StallSeconds = Annotated[
    float, typer.Option(help="Give a source up that makes no progress for so long, in seconds; above 0.")
]
DecodeThreads = Annotated[
    int | None, typer.Option(help="Processor threads for decoding, at least 1. Default: all, at most 8.")
]
Reduce = Annotated[
    str,
    typer.Option(
        envvar="STREAMVID_REDUCE",
        help="Token reduction, methods in the order data passes them, as in 'rlt,fastvid:keep_ratio=0.25'; 'none' "
        "keeps everything. See `streamvid methods list`.",
    ),
]
Recall = Annotated[
    str, typer.Option(help="How the budget is spent on the memory: hybrid, uniform or recent (last frames only).")
]
BudgetTokens = Annotated[
    int, typer.Option("--budget", help="Visual tokens one answer may read, at least 1; more sees more detail.")
]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Memory = Annotated[
    Path | None,
    typer.Option(
        envvar="STREAMVID_MEMORY", help="Folder of the memory. Default: streamvid/memory in your data folder."
    ),
]
DiskGigabytes = Annotated[
    float | None,
    typer.Option(
        "--disk",
        help="Most the memory folder may hold, in GB; old memory is made smaller to stay below. Default: no limit.",
    ),
]
SourceDiskGigabytes = Annotated[
    float | None, typer.Option("--source-disk", help="Most that one video's memory may hold, in GB. Default: no limit.")
]
RamGigabytes = Annotated[
    float | None,
    typer.Option(
        "--ram",
        help="Main memory an answer on the CPU may take, the model included, in GB; it is given fewer "
        "tokens if need be.",
    ),
]
VramGigabytes = Annotated[float | None, typer.Option("--vram", help="The same for an accelerator's memory, in GB.")]
Keep = Annotated[bool, typer.Option("--keep", help="Never make this video's memory smaller when space is needed.")]
Codec = Annotated[
    str,
    typer.Option(
        help="How new tokens are stored: fp32, fp16, sq8, sq4 or pq, from exact to small; FEATURES+LAYERS such as "
        "sq8+sq4 sets both. What is remembered already is read as it was stored."
    ),
]
KeepKv = Annotated[
    bool,
    typer.Option(
        "--keep-kv",
        help="Keep what the language model computed for the video beside the memory: the next question on the same "
        "spans starts at once. Takes about 0.1 MB a token for a 2B model; methods inside the language model are left "
        "out.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no receipt on stderr; warnings stay.")]
