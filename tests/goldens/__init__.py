"""Compares our methods with arrays that the authors' own code produced.

A folder of goldens has one folder per method id with ``*.npz`` files, each holding inputs, settings
and outputs of one run.  ``runners/<id>.py`` knows what the arrays of a method mean.
"""

from __future__ import annotations

import importlib
import importlib.util
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamvid.temporal.methods.registry import methods

HERE = Path(__file__).parent

Case = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one case."""

    method: str
    case: str
    ok: bool | None
    """None where there is no such method, so nothing could be compared."""

    detail: str = ""


def find(folder: Path) -> list[tuple[str, Path]]:
    """Method ids and case files of a folder of goldens, sorted."""
    return sorted((path.parent.name, path) for path in folder.glob("*/*.npz"))


def run(folder: Path) -> Iterator[Outcome]:
    """Every case of a folder, one after another."""
    for method, path in find(folder):
        yield check(method, path)


def check(method: str, path: Path) -> Outcome:
    """One case; a runner that fails is a case that differs."""
    if method not in methods():
        return Outcome(method, path.stem, None, "there is no such method here")
    name = f"{__name__}.runners.{method}"
    if importlib.util.find_spec(name) is None:
        return Outcome(method, path.stem, False, f"the method exists, but no runner {name}")
    try:
        with np.load(path, allow_pickle=False) as file:
            case = dict(file)
        with torch.inference_mode():
            differs = importlib.import_module(name).run(case)
    except Exception as error:  # a crash is a result too: the other cases still run
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = " ".join(str(error).split())
        return Outcome(method, path.stem, False, f"{type(error).__name__} in {where.name}:{where.lineno}: {message}")
    return Outcome(method, path.stem, differs is None, differs or "")


def scalar(case: Case, name: str) -> Any:
    """A setting; floats were stored as float32 and are rounded back to six decimals."""
    value = case[name].item()
    return round(value, 6) if isinstance(value, float) else value


def tensor(case: Case, name: str) -> torch.Tensor:
    """An array as a tensor."""
    return torch.from_numpy(np.ascontiguousarray(case[name]))


def difference(
    name: str, got: object, expected: np.ndarray | torch.Tensor, *, rtol: float = 1e-4, atol: float = 1e-5
) -> str | None:
    """How an output differs, or None: integers exactly, floats within the tolerance."""
    ours = torch.as_tensor(got)
    theirs = torch.as_tensor(expected)
    if ours.shape != theirs.shape:
        return f"{name}: shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
    if not theirs.is_floating_point():
        wrong = int((ours.to(torch.int64) != theirs.to(torch.int64)).sum())
        return f"{name}: {wrong} of {theirs.numel()} differ" if wrong else None
    off = (ours.double() - theirs.double()).abs()
    if bool((off <= atol + rtol * theirs.double().abs()).all()):
        return None
    return f"{name}: off by up to {float(off.max()):.3g}, allowed {atol:g} + {rtol:g} of the value"


def first(*differences: str | None) -> str | None:
    """The first difference there is."""
    return next((d for d in differences if d is not None), None)
