"""What search indexes ask the catalogue: the keys of some sources, and which indexes are saved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from streamvid.memory.database import Database, now
from streamvid.memory.records import SnapshotRecord


class Scopes(Database):
    """The part of the catalogue that search indexes are made from."""

    def key_width(self, source_id: int) -> int | None:
        """Dk of a source's keys; None before its first span."""
        rows = self._rows(
            "SELECT width FROM keys JOIN spans ON keys.span_id = spans.id WHERE source_id = ? LIMIT 1", source_id
        )
        return int(rows[0]["width"]) if rows else None

    def embedder_sources(self, embedder: str) -> list[int]:
        """The ids of all sources whose keys were made by one embedder, oldest first."""
        rows = self._rows("SELECT id FROM sources WHERE json_extract(key, '$.embedder') = ? ORDER BY id", embedder)
        return [row["id"] for row in rows]

    def scope_size(self, source_ids: Sequence[int], *, until: int = 2**63 - 1) -> tuple[int, int]:
        """How many spans with ids up to ``until`` some sources have, and the highest id; (0, 0) without any."""
        row = self._rows(
            "SELECT COUNT(*) AS spans, COALESCE(MAX(id), 0) AS last FROM spans "
            "WHERE source_id IN (SELECT value FROM json_each(?)) AND id <= ?",
            json.dumps(list(source_ids)),
            until,
        )[0]
        return row["spans"], row["last"]

    def keys_per_span(self, source_ids: Sequence[int], *, width: int) -> float:
        """How many keys of this width a span of some sources has, about: the mean of a few."""
        row = self._rows(
            "SELECT AVG(length(vectors)) AS bytes FROM (SELECT id FROM spans WHERE source_id IN "
            "(SELECT value FROM json_each(?)) LIMIT 64) AS few JOIN keys ON keys.span_id = few.id",
            json.dumps(list(source_ids)),
        )[0]
        return (row["bytes"] or 0) / (4 * width)

    def scope_ids(self, source_ids: Sequence[int], *, after: int = 0) -> Tensor:
        """(S,) int64, rising: the spans of some sources with ids higher than ``after``."""
        # The newest few by the order of the table, all of them by the index, which is far smaller.
        way = "spans NOT INDEXED" if after else "spans"
        with self._reported():
            rows = self._db.execute(
                f"SELECT id FROM {way} WHERE source_id IN (SELECT value FROM json_each(?)) AND id > ?",
                (json.dumps(list(source_ids)), after),
            )
            rows.row_factory = None
            ids = np.fromiter(chain.from_iterable(rows), np.int64)
        return torch.from_numpy(np.sort(ids))

    def keys_of(self, span_ids: Tensor, *, width: int) -> tuple[Tensor, Tensor]:
        """All keys of some spans, as two tensors however many spans there are.

        Args:
            span_ids: (S,) int64, each once; those that are gone are left out.
            width: Dk; spans with keys of another width are left out, as they cannot be compared.

        Returns:
            ids (M,) int64, together per span and rising, and keys (M, Dk) float32, unit length.
        """
        with self._reported():
            rows = self._db.execute(
                "SELECT span_id, vectors FROM keys WHERE width = ? AND length(vectors) % ? = 0 "
                "AND span_id IN (SELECT value FROM json_each(?)) ORDER BY span_id",
                (width, 4 * width, json.dumps(span_ids.tolist())),
            )
            rows.row_factory = None
            found = rows.fetchall()
        ids = np.fromiter((row[0] for row in found), np.int64, len(found))
        counts = np.fromiter((len(row[1]) for row in found), np.int64, len(found)) // (4 * width)
        keys = np.frombuffer(bytearray().join(row[1] for row in found), "<f4").reshape(-1, width)
        return torch.from_numpy(np.repeat(ids, counts)), torch.from_numpy(keys.astype(np.float32, copy=False))

    def keys_after(
        self, source_ids: Sequence[int], span_id: int = 0, *, width: int, block_spans: int = 4096
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The keys of all spans with higher ids than one, as in `keys_of`, a block at a time.

        Spans are those there are when the first block is asked for, and not held meanwhile: one that is
        removed before its block comes is left out, and writers go on.
        """
        ids = self.scope_ids(source_ids, after=span_id)
        for first in range(0, len(ids), block_spans):
            yield self.keys_of(ids[first : first + block_spans], width=width)

    def add_snapshot(self, snapshot: SnapshotRecord) -> None:
        """Enter a saved index that is safely on the disk, in place of all older ones of its scope and kind."""
        with self.transaction():
            self._db.execute(
                "DELETE FROM snapshots WHERE source_id IS ? AND embedder = ? AND kind = ?",
                (snapshot.source_id, snapshot.embedder, snapshot.kind),
            )
            self._db.execute(
                "INSERT INTO snapshots (source_id, embedder, kind, width, vectors, last_span_id, file, bytes, digest, "
                "created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    snapshot.source_id,
                    snapshot.embedder,
                    snapshot.kind,
                    snapshot.width,
                    snapshot.vectors,
                    snapshot.last_span_id,
                    snapshot.file,
                    snapshot.num_bytes,
                    snapshot.digest,
                    now(),
                ),
            )

    def snapshots(self) -> list[SnapshotRecord]:
        """All saved indexes, newest first."""
        return [
            SnapshotRecord(
                source_id=row["source_id"],
                embedder=row["embedder"],
                kind=row["kind"],
                width=row["width"],
                vectors=row["vectors"],
                last_span_id=row["last_span_id"],
                file=row["file"],
                num_bytes=row["bytes"],
                digest=row["digest"],
            )
            for row in self._rows("SELECT * FROM snapshots ORDER BY id DESC")
        ]

    def snapshot_bytes(self) -> int:
        """Size of all saved indexes, as far as they are in the catalogue."""
        return int(self._rows("SELECT COALESCE(SUM(bytes), 0) AS total FROM snapshots")[0]["total"])
