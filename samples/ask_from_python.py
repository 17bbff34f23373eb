"""Ask a video from Python: watched once, remembered, asked again at once.

python samples/ask_from_python.py [VIDEO]
"""

from __future__ import annotations

import sys
from pathlib import Path

from streamvid_pipelines.ask import ask

video = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "three_shapes.mp4"

answers = ask(
    video,
    ["what happens?", "which shape comes last?"],
    model="toy",  # any checkpoint folder or repository name; "auto" takes the largest that fits
    on_text=lambda piece: print(piece, end="", flush=True),
)
print()
for answer in answers:
    receipt = answer.receipt
    print(f"{answer.question}\n  {answer.text}")
    print(f"  seen at {[f'{a:.0f}-{b:.0f} s' for a, b in answer.spans]}")
    print(f"  cache {receipt.cache}, {receipt.tokens_given} of {receipt.tokens_seen} tokens given")
