from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.goldens import HERE, check, find
from tests.goldens.__main__ import main

SHARED = Path(__file__).parents[2] / "shared" / "goldens"
"""More cases than the repository holds, where somebody put them beside it."""

METHODS = {runner.stem for runner in (HERE / "runners").glob("[a-z]*.py")}
CASES = [case for folder in (HERE, SHARED) for case in find(folder) if case[0] in METHODS]


@pytest.mark.parametrize(("method", "path"), CASES, ids=[f"{p.parents[1].name}-{m}-{p.stem}" for m, p in CASES])
def test_matches_the_authors_code(method: str, path: Path) -> None:
    outcome = check(method, path)
    assert outcome.ok, outcome.detail


@pytest.mark.parametrize("method", sorted(METHODS))
def test_repository_holds_a_case_with_its_origin(method: str) -> None:
    assert list((HERE / method).glob("*.npz"))
    assert "commit" in (HERE / method / "README.md").read_text()


def altered(tmp_path: Path, method: str, array: str) -> Path:
    source = sorted((HERE / method).glob("*.npz"))[0]
    with np.load(source) as file:
        case = dict(file)
    case[array] = case[array].copy()
    case[array].flat[0] += 1
    (tmp_path / method).mkdir()
    np.savez(tmp_path / method / "another_name.npz", **case)
    return tmp_path


@pytest.mark.parametrize(
    ("method", "array"),
    [("rlt", "token_mask"), ("fastvid", "hidden_out"), ("fastvid", "keep_indexs"), ("frame_fusion", "hidden_out_0")],
)
def test_a_difference_is_found(method: str, array: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The runners would be worthless if they passed whatever the arrays say."""
    assert main([str(altered(tmp_path, method, array)), "--json"]) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["passed"], report["failed"]) == (0, 1)
    assert array in report["cases"][0]["detail"]


def test_unknown_methods_are_skipped_and_broken_cases_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "not_a_method").mkdir()
    np.savez(tmp_path / "not_a_method" / "case.npz", x=np.zeros(1))
    assert main([str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["skipped"] == 1
    assert report["cases"] == []
    (tmp_path / "rlt").mkdir()
    np.savez(tmp_path / "rlt" / "case.npz", x=np.zeros(1))
    assert main([str(tmp_path)]) == 1
    assert "KeyError" in capsys.readouterr().out


def test_method_without_a_runner_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "uniform").mkdir()
    path = tmp_path / "uniform" / "case.npz"
    np.savez(path, x=np.zeros(1))
    outcome = check("uniform", path)
    assert outcome.ok is False
    assert "no runner" in outcome.detail


def test_an_empty_folder_is_not_a_success(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 1
