"""Actions: what reaches the receiver, and how each failure is told."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamvid.errors import SettingsError
from streamvid.watch.actions import Command, Jsonl, NotDelivered, Webhook, parse_action
from streamvid.watch.alerts import Alert

ALERT = Alert(
    rule="a red circle appears", stream="yard", start=Fraction(7, 2), stop=Fraction(5), wall=1.7e9, score=1.25,
    reason="it's red; $(rm) `ls` 'quoted'", clip_path="clips/a b.mp4", frame_path="f.png", priority=7,
)  # fmt: skip
PRINT = f"{sys.executable} -c 'import sys,json;open(sys.argv[1],\"a\").write(json.dumps(sys.argv[2:]))'"


@dataclass
class Receiver:
    """A server that answers what it is told, in turn, and keeps what came."""

    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    came: list[tuple[dict[str, str], Any]] = field(default_factory=list)
    wait_seconds: float = 0.0
    port: int = 0


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    box = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            box.came.append(({k.lower(): v for k, v in self.headers.items()}, json.loads(body)))
            time.sleep(box.wait_seconds)
            status, headers = box.answers.pop(0) if box.answers else (204, {})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    box.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield box
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_line_of_json_is_appended_and_reads_back(tmp_path: Path) -> None:
    action = Jsonl(tmp_path / "a.jsonl")
    action.deliver(ALERT.message())
    action.deliver(ALERT.message())
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [ALERT.id, ALERT.id]
    assert json.loads(lines[0]) == ALERT.message()
    assert json.loads(lines[0])["wall"] == "2023-11-14T22:13:20.000+00:00"


def test_a_line_that_a_crash_left_unfinished_spoils_only_itself(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"id": "torn')
    Jsonl(file).deliver(ALERT.message())
    torn, whole = file.read_text().splitlines()
    assert torn == '{"id": "torn'
    assert json.loads(whole)["id"] == ALERT.id


def test_a_file_that_cannot_be_written_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    action = Jsonl(folder / "a.jsonl")
    folder.rmdir()
    with pytest.raises(NotDelivered, match="a.jsonl cannot be written: No such file") as caught:
        action.deliver(ALERT.message())
    assert caught.value.again
    with pytest.raises(SettingsError, match="a folder that is there"):
        Jsonl(folder / "a.jsonl")


def test_a_command_gets_every_word_whole_and_no_shell_sees_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    action = Command(f"{PRINT} {out} {{reason}} clip={{clip}} {{{{x}}}} {{start}}-{{stop}} {{id}}")
    action.deliver(ALERT.message())
    assert json.loads(out.read_text()) == [ALERT.reason, "clip=clips/a b.mp4", "{x}", "3.5-5", ALERT.id]


@given(reason=st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=40))
def test_nothing_in_an_alert_splits_or_is_filled_in_again(reason: str) -> None:
    from streamvid.watch import actions

    seen: list[list[str]] = []

    class Process:
        def __init__(self, words: list[str], **_: object) -> None:
            seen.append(words)
            self.pid = 2**22 + 1  # no process

        def wait(self, *_: object) -> int:
            return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actions.subprocess, "Popen", Process)
        message = ALERT.message() | {"reason": reason}
        Command("true {reason} a{reason}b").deliver(message)
    assert seen == [["true", reason, f"a{reason}b"]]


def test_a_failing_command_says_what_it_printed(tmp_path: Path) -> None:
    action = Command(f"{sys.executable} -c 'import sys; print(\"no such room\"); sys.exit(3)'")
    with pytest.raises(NotDelivered, match="ended with code 3: no such room") as caught:
        action.deliver(ALERT.message())
    assert caught.value.again


def test_a_command_that_does_not_end_is_ended_with_its_children(tmp_path: Path) -> None:
    late = tmp_path / "late"
    child = f"import time; time.sleep(1.2); open({str(late)!r}, 'w')"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    script = tmp_path / "parent.py"
    script.write_text(parent)
    began = time.monotonic()
    with pytest.raises(NotDelivered, match="did not end within 0.5 s"):
        Command(f"{sys.executable} {script}", limit_seconds=0.5).deliver(ALERT.message())
    assert time.monotonic() - began < 5
    time.sleep(1.5)
    assert not late.exists()


def test_a_webhook_posts_the_alert_with_its_id_and_login(receiver: Receiver) -> None:
    Webhook(f"http://me:pass@127.0.0.1:{receiver.port}/hook?k=1").deliver(ALERT.message())
    headers, body = receiver.came[0]
    assert body == ALERT.message()
    assert headers["idempotency-key"] == ALERT.id
    assert headers["authorization"] == "Basic bWU6cGFzcw=="


@pytest.mark.parametrize(
    ("status", "again", "down"),
    [(500, True, False), (503, True, True), (429, True, True), (408, True, False), (404, False, False),
     (401, False, False), (302, False, False)],
)  # fmt: skip
def test_answers_are_refusals_or_tried_again(receiver: Receiver, status: int, again: bool, down: bool) -> None:
    receiver.answers = [(status, {"retry-after": "7", "location": "http://127.0.0.1:1/"})]
    with pytest.raises(NotDelivered, match=f"answers {status}") as caught:
        Webhook(f"http://127.0.0.1:{receiver.port}/").deliver(ALERT.message())
    assert (caught.value.again, caught.value.down) == (again, down)
    assert caught.value.after_seconds == (7.0 if again else None)
    assert len(receiver.came) == 1


def test_a_server_that_is_slow_or_gone_is_down(receiver: Receiver) -> None:
    receiver.wait_seconds = 0.6
    with pytest.raises(NotDelivered, match="does not answer within 0.2 s") as slow:
        Webhook(f"http://127.0.0.1:{receiver.port}/", limit_seconds=0.2).deliver(ALERT.message())
    with pytest.raises(NotDelivered, match="cannot be reached") as gone:
        Webhook("http://127.0.0.1:9/").deliver(ALERT.message())
    assert slow.value.down and gone.value.down


def test_no_secret_of_an_address_is_printed_or_stored(receiver: Receiver) -> None:
    receiver.answers = [(403, {}), (500, {})]
    hook = Webhook(f"http://me:S3CRET@127.0.0.1:{receiver.port}/services/S3CRET?token=S3CRET")
    shown = [hook.label, hook.key]
    for _ in range(2):
        with pytest.raises(NotDelivered) as caught:
            hook.deliver(ALERT.message())
        shown.append(str(caught.value))
    for wrong in ("webhook ftp://me:S3CRET@host/x", "https://me:S3CRET@:99999999/x", "webhok https://me:S3CRET@host/"):
        with pytest.raises(SettingsError) as refused:
            parse_action(wrong)
        shown.append(str(refused.value))
    assert not any("S3CRET" in text for text in shown)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("webhok https://host/", "did you mean webhook?"),
        ("jsonl", "needs something after it"),
        ("command 'open", "close its quotes"),
        ("command surely-no-such-program {clip}", "no program 'surely-no-such-program'"),
        ("command true {clp}", "did you mean clip"),
        ("", "begins with command, jsonl or webhook"),
    ],
)
def test_a_wrong_action_is_refused_before_anything_runs(text: str, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_action(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bare_address_is_a_webhook(tmp_path: Path) -> None:
    assert isinstance(parse_action("https://host/x"), Webhook)
    assert isinstance(parse_action(f"jsonl {tmp_path}/a.jsonl"), Jsonl)
    assert isinstance(parse_action("command true {clip}"), Command)
