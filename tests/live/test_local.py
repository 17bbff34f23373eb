"""Questions from another process: who answers, what happens to those who leave, who may enter."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamvid.errors import BankError, SettingsError
from streamvid_pipelines.live import local
from streamvid_pipelines.live.local import Door, ask, socket_path


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


def echo(stream: str, question: str, most: int | None, on_text: Callable[[str], None]) -> dict[str, Any]:
    if question == "bad":
        raise SettingsError("this cannot be asked; ask another")
    for piece in question.split():
        on_text(piece)
    return {"answer": f"{stream}: {question}", "most": most}


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    with Door(tmp_path / "memory", ["front", "back"], echo) as opened:
        yield opened


@pytest.mark.usefixtures("door")
def test_an_answer_comes_in_pieces_and_then_whole(tmp_path: Path) -> None:
    pieces: list[str] = []
    answer = ask(tmp_path / "memory", "front", "who came in?", max_new_tokens=7, on_text=pieces.append)
    assert answer == {"answer": "front: who came in?", "most": 7}
    assert pieces == ["who", "came", "in?"]
    assert ask(tmp_path / "memory", "back", "ü?") == {"answer": "back: ü?", "most": None}
    with pytest.raises(SettingsError, match="ask another"):
        ask(tmp_path / "memory", "front", "bad")


def test_nobody_answers_where_nobody_watches(tmp_path: Path) -> None:
    assert ask(tmp_path / "memory", "front", "who?") is None
    with Door(tmp_path / "memory", ["front"], echo):
        assert ask(tmp_path / "other", "front", "who?") is None, "another memory has other streams"
    assert ask(tmp_path / "memory", "front", "who?") is None
    assert not socket_path(tmp_path / "memory", "front").exists()


def test_a_socket_left_by_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    path = socket_path(tmp_path / "memory", "front")
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    assert ask(tmp_path / "memory", "front", "who?") is None
    with Door(tmp_path / "memory", ["front"], echo):
        assert ask(tmp_path / "memory", "front", "who?") is not None


@pytest.mark.usefixtures("door")
def test_two_processes_do_not_watch_the_same(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="watched into .* by another process"):
        Door(tmp_path / "memory", ["side", "front"], echo)
    assert ask(tmp_path / "memory", "front", "who?") is not None, "the first goes on"
    assert ask(tmp_path / "memory", "side", "who?") is None


@pytest.mark.usefixtures("door")
def test_who_leaves_or_talks_nonsense_disturbs_nobody(tmp_path: Path) -> None:
    path = str(socket_path(tmp_path / "memory", "front"))
    for sent in (b"", b"no json\n", b"[]\n", b'{"question"\n', b'{"max_new_tokens": 3}\n', b'{"question": "a b c"}\n'):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            connection.sendall(sent)
            if sent.endswith(b"\n") and b'"a b c"' not in sent:
                reply = json.loads(connection.makefile("rb").readline())
                assert "one line of JSON" in reply["error"], sent
    assert ask(tmp_path / "memory", "front", "who?") is not None


def test_many_ask_at_once(tmp_path: Path) -> None:
    """More than are served at the same time: the others wait, and each gets its own answer."""
    answers: dict[int, Any] = {}
    with Door(tmp_path / "memory", ["front"], echo):

        def one(number: int) -> None:
            answers[number] = ask(tmp_path / "memory", "front", f"question {number}")

        threads = [threading.Thread(target=one, args=(n,)) for n in range(3 * local.AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert {n: answer["answer"] for n, answer in answers.items()} == {
        n: f"front: question {n}" for n in range(3 * local.AT_ONCE)
    }


def test_a_process_that_ends_before_it_answered_is_said_to(tmp_path: Path) -> None:
    path = socket_path(tmp_path / "memory", "front")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)

    def leave() -> None:
        connection, _ = listener.accept()
        connection.recv(1000)
        connection.close()

    thread = threading.Thread(target=leave)
    thread.start()
    with pytest.raises(BankError, match="ended before it had answered"):
        ask(tmp_path / "memory", "front", "who?")
    thread.join(5)
    listener.close()


def test_a_folder_that_others_can_enter_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "streamvid"
    folder.mkdir(parents=True)
    os.chmod(folder, 0o755)
    with pytest.raises(BankError, match="can be entered by others"):
        Door(tmp_path / "memory", ["front"], echo)


def test_the_path_is_short_however_long_the_names(tmp_path: Path) -> None:
    """A socket's path may have 107 bytes."""
    deep = tmp_path / ("x" * 200) / ("y" * 200)
    assert len(socket_path(deep, "n" * 64).name) < 40
