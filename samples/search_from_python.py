"""Search what is remembered with words, and with a picture: which video, when, how like it.

python samples/search_from_python.py [TEXT]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from streamvid.ingest import Sampling, open_source
from streamvid.memory.bank import Bank
from streamvid.models.checkpoints import find_embedder
from streamvid.query.evidence import clock
from streamvid.query.search import search
from streamvid_pipelines.ask import ask

text = sys.argv[1] if len(sys.argv) > 1 else "blue square"
clips = [Path(__file__).parent / f"{name}.mp4" for name in ("three_shapes", "long_wait")]

with tempfile.TemporaryDirectory() as folder:
    for clip in clips:
        ask(clip, "what happens?", model="toy", memory=Path(folder))
    with open_source(clips[0]) as video:
        frame = next(iter(video.frames(Sampling(fps=1, start=7))))
    embedder = find_embedder("auto", model="toy", device="cpu")
    with Bank.open(Path(folder)) as bank:
        for query, name in ((text, text), (frame.pixels, "the picture at 00:07 of three_shapes.mp4")):
            print(name)
            result = search(bank, query, embedder=embedder, top=3, join_seconds=0)
            for found in result:
                when = f"{clock(found.start_seconds)}-{clock(found.stop_seconds)}"
                [tokens] = bank.read([(found.span, min(8, found.span.tokens))])
                print(f"  {found.source.name} {when}  {found.similarity:.2f}, {len(tokens)} tokens read")
            for note in result.notes:
                print(f"  note: {note}")
