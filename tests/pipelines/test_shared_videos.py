"""The whole program over real and hostile files: an answer or one clear line, never anything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamvid.errors import SourceError
from streamvid.memory.bank import Bank
from streamvid_pipelines.ask import AskVideo, Loaded, Request, load

SHARED = Path(__file__).parents[3] / "shared" / "videos"
FILES = sorted(p for p in SHARED.glob("*/*") if p.suffix not in (".json", ".txt", ".md"))
REQUEST = Request(model="toy", max_frames=32, max_new_tokens=24)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(REQUEST, lambda text: None)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_file_is_answered_or_refused_in_one_line(path: Path, loaded: Loaded, tmp_path: Path) -> None:
    with Bank.open(tmp_path) as bank:
        try:
            answer = AskVideo(path, REQUEST, loaded, bank).ask("what happens?")
        except SourceError as error:
            assert "\n" not in str(error) and path.name in str(error)
            assert path.parent.name == "odd", "every natural file can be read"
        else:
            receipt = answer.receipt
            assert 0 < receipt.frames_remembered
            assert receipt.tokens_given <= receipt.tokens_remembered <= receipt.tokens_seen
            for start, stop in answer.spans:
                assert receipt.start_seconds <= start < stop
