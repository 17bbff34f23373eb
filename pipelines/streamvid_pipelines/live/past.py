"""Asking about a stream that nobody watches now: its memory answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from fractions import Fraction
from typing import Any

from streamvid.errors import BankError, SettingsError, near
from streamvid.memory.bank import Bank
from streamvid.memory.place import default_folder
from streamvid.memory.records import GapRecord, SourceRecord
from streamvid.receipt import Receipt
from streamvid.session import Session
from streamvid.temporal.methods.compose import Chain
from streamvid_pipelines.ask import Loaded, Request, load

PREFIX = "live:"
"""How the content of a live source begins in its memory key."""


class Past:
    """The memory of one stream, asked while nobody watches it.

    Args:
        stream: its name.
        request: model, memory and limits; sampling and decoding play no part.
        say: told before anything large happens.
    """

    def __init__(self, stream: str, request: Request, say: Callable[[str], None]) -> None:
        request.check()
        self.stream, self.request, self._say = stream, request, say
        self.folder = request.memory if request.memory is not None else default_folder()
        self._loaded: Loaded | None = None

    def ask(self, question: str, on_text: Callable[[str], None] | None = None) -> dict[str, Any]:
        """Answer a question from memory.

        Returns:
            What ``--json`` prints.

        Raises:
            SettingsError: if nothing is remembered of such a stream.
            BankError: if only another model can read it.
        """
        with Bank.open(self.folder, limits=self.request.limits(), create=False) as bank:
            sources = streams(bank)
            found = [source for source in sources if source.key.content == f"{PREFIX}{self.stream}"]
            if not found:
                names = [source.key.content.removeprefix(PREFIX) for source in sources]
                known = near(self.stream, names) if names else "none was watched yet: streamvid live SOURCE"
                raise SettingsError(f"no stream called {self.stream!r} is remembered in {self.folder}; {known}")
            if self._loaded is None:
                named = found[-1].summary.get("model", "auto")
                wanted = replace(self.request, model=named) if self.request.model == "auto" else self.request
                self._loaded = load(wanted, self._say)
            loaded = self._loaded
            source = self._fitting(found, loaded)
            session = Session(
                loaded.adapter,
                bank,
                chain=Chain.parse(self.request.reduce),
                embedder=loaded.embedder if loaded.embedder and _made(source, loaded) else None,
                recall=self.request.recall_method(),
                limits=self.request.limits(),
            )
            receipt = Receipt(source=self.stream, model=loaded.adapter.info.name, cache="hit", key=source.key.short)
            for note in (*loaded.notes, *bank.notes):
                receipt.warn(note)
            receipt.warn(f"{self.stream} is not watched now; this is from memory")
            told = source.summary
            receipt.tokens_remembered, receipt.memory_bytes = source.tokens, source.num_bytes
            receipt.tokens_seen = told.get("tokens_seen", 0)
            receipt.frames_remembered = told.get("frames_remembered", 0)
            answer = session.ask(
                question,
                source,
                receipt,
                max_new_tokens=self.request.max_new_tokens,
                on_text=on_text,
                **_present(source),
            )
            if not bank.read_only:
                bank.save_answer(source.id, question=question, answer=answer.text, receipt=receipt.to_dict())
            return answer.to_dict()

    def _fitting(self, found: list[SourceRecord], loaded: Loaded) -> SourceRecord:
        """The latest memory of the stream that was made by the model at hand."""
        model = f"{loaded.adapter.info.fingerprint}/{loaded.adapter.info.dtype}"
        fitting = [source for source in found if source.key.model == model]
        if not fitting:
            raise BankError(
                f"{self.stream} was watched by another model than {loaded.adapter.info.name} "
                f"({loaded.adapter.info.dtype}), whose memory this one cannot read; say which with --model and --dtype"
            )
        return fitting[-1]


def streams(bank: Bank) -> list[SourceRecord]:
    """All live sources of a memory, oldest first."""
    return [source for source in bank.sources() if source.key.content.startswith(PREFIX)]


def _present(source: SourceRecord) -> dict[str, Any]:
    """The clock of a stream that is not watched now: what came after its end is a gap."""
    told = source.summary
    if "origin" not in told:
        return {}
    origin = datetime.fromisoformat(told["origin"])
    stop = max(source.stop or Fraction(0), Fraction(told.get("watched_until", 0)))
    now = Fraction((datetime.now(origin.tzinfo) - origin).total_seconds())
    if now <= stop:
        return {"origin": origin, "now": float(stop)}
    away = GapRecord(source.id, stop, now, "nobody watches: streamvid live is not running", datetime.now().astimezone())
    return {"origin": origin, "now": float(now), "lost": [away]}


def _made(source: SourceRecord, loaded: Loaded) -> bool:
    return loaded.embedder is not None and source.key.embedder == loaded.embedder.fingerprint
