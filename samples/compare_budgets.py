"""The same question at several budgets, beside uniform sampling and the last frames alone.

One memory serves all budgets and all recall methods: a smaller budget reads less of it.

    python samples/compare_budgets.py [VIDEO [QUESTION]]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from streamvid.memory.bank import Bank
from streamvid_pipelines.ask import AskVideo, Request, load

video = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "three_shapes.mp4"
question = sys.argv[2] if len(sys.argv) > 2 else "which shape comes first?"
loaded = load(Request(model="toy"), print)

print(question)
with tempfile.TemporaryDirectory() as folder:
    for recall in ("hybrid", "uniform", "recent"):
        for budget in (16, 48, 4096):
            request = Request(model="toy", recall=recall, budget=budget)
            with Bank.open(Path(folder)) as bank:
                answer = AskVideo(video, request, loaded, bank).ask(question)
            receipt = answer.receipt
            print(f"{recall:8} {budget:5} {receipt.tokens_given:4} tokens, cache {receipt.cache:4}  {answer.text}")
