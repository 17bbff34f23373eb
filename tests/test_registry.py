from __future__ import annotations

import pkgutil
from pathlib import Path

import pytest

import streamvid.temporal.methods as package
from streamvid.budget import Budget
from streamvid.errors import SettingsError
from streamvid.temporal.methods.base import Stage
from streamvid.temporal.methods.compose import DEFAULT, Chain
from streamvid.temporal.methods.embedding.fastvid import FastVid
from streamvid.temporal.methods.llm.frame_fusion import FrameFusion
from streamvid.temporal.methods.pixel.rlt import Rlt
from streamvid.temporal.methods.registry import build, method_id, methods


def test_the_folder_is_the_registry() -> None:
    root = Path(next(iter(package.__path__)))
    files = [m.name for stage in Stage for m in pkgutil.iter_modules([str(root / stage.value)])]
    assert len(files) == len(set(files)), "an id stands for one method"
    assert set(files) <= set(methods())
    stages = [cls.stage for cls in methods().values()]
    assert stages[: len(files)] == sorted(stages[: len(files)], key=list(Stage).index)


def test_a_method_knows_its_id() -> None:
    assert method_id(Rlt) == method_id(Rlt()) == "rlt"
    assert method_id(FrameFusion) == "frame_fusion"


def test_settings_are_read_by_their_kind() -> None:
    method = build("fastvid:keep_ratio=0.5, dtm_p=2 ,variant=parallel")
    assert method == FastVid(Budget(keep_ratio=0.5), dtm_p=2, variant="parallel")
    assert build("fastvid:tokens=64").settings()["budget"] == Budget(tokens=64)
    built = build("frame_fusion:num_layers_reference=28,keep_text=false")
    assert built == FrameFusion(num_layers_reference=28, keep_text=False)
    assert build("rlt") == Rlt()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("frame_fuson", "did you mean frame_fusion"),
        ("", "known: .*rlt"),
        ("rlt:treshold=1", "did you mean threshold"),
        ("fastvid:keep_ration=1", "did you mean keep_ratio"),
        ("fastvid:budget=1", "has no setting 'budget'"),
        ("fastvid:keep_ratio", "key=value"),
        ("fastvid:keep_ratio=lots", "must be a number"),
        ("fastvid:keep_ratio=2", r"\(0, 1\]"),
        ("fastvid:dtm_p=1.5", "whole number"),
        ("fastvid:variant=fast", "must be one of parallel, sequential, qwen"),
        ("frame_fusion:keep_text=maybe", "true or false"),
        ("rlt:_age=1", "has no setting"),
    ],
)
def test_mistakes_are_explained(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build(text)


def test_a_comma_goes_on_with_settings_or_starts_a_method() -> None:
    chain = Chain.parse("rlt:threshold=0.2,refresh=4, fastvid:keep_ratio=0.1,dtm_p=2,frame_fusion")
    assert chain.methods == (
        Rlt(threshold=0.2, refresh=4),
        FastVid(Budget(keep_ratio=0.1), dtm_p=2),
        FrameFusion(),
    )
    assert [len(part) for part in (chain.pixel, chain.embedding, chain.llm)] == [1, 1, 1]


def test_the_default_chain_and_the_empty_one() -> None:
    assert [method_id(m) for m in Chain.parse(DEFAULT).methods] == ["rlt", "fastvid"]
    assert Chain.parse("none") == Chain.parse(" ") == Chain()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fastvid,rlt", r"order data passes them .*got fastvid \(embedding\), rlt \(pixel\)"),
        ("rlt,uniform", "--recall uniform"),
        ("rlt,,fastvid", "there is no method ''"),
        ("rlt,fastvidd", "did you mean fastvid"),
        ("threshold=0.2,rlt", "there is no method 'threshold=0.2'"),
    ],
)
def test_chains_that_cannot_be_are_refused_when_put_together(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Chain.parse(text)


def test_another_stream_gets_the_same_chain_with_methods_of_its_own() -> None:
    chain = Chain.parse(DEFAULT)
    twin = chain.spawn()
    assert twin == chain
    assert all(a is not b for a, b in zip(twin.methods, chain.methods, strict=True))


def test_a_chain_describes_itself_in_plain_values() -> None:
    described = Chain.parse("rlt:refresh=2,fastvid:tokens=9,frame_fusion").describe()
    assert described[0] == {"method": "rlt", "threshold": 0.1, "refresh": 2}
    assert "tokens=9" in str(described[1]["budget"])
    assert described[2]["num_layers_reference"] is None
    ingest = Chain.parse("rlt,fastvid,frame_fusion").describe(ingest_only=True)
    assert [entry["method"] for entry in ingest] == ["rlt", "fastvid"]
