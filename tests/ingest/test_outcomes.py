"""Every shared video against the table of what it is known to give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ingest.outcomes import TABLE, VIDEOS, files, outcome

pytestmark = [
    pytest.mark.skipif(not VIDEOS.is_dir(), reason="no shared videos beside this checkout"),
    pytest.mark.slow,
]
ROWS = json.loads(TABLE.read_text())


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in files()])
def test_it_gives_what_is_known_of_it(path: Path) -> None:
    assert outcome(path) == ROWS[path.name]


def test_the_table_has_no_rows_for_nothing() -> None:
    assert set(ROWS) == {path.name for path in files()}
