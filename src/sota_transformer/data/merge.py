"""Merges units in order: deduplicate, assign splits, write shards, collect the manifest.

A document's split is a function of its hash alone, and of equal documents the first in unit order
stays; so nothing here depends on which worker encoded what, or when.
"""

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sota_transformer.data.encode import DUPLICATE, HASH_BYTES, Encoded, Rejects
from sota_transformer.data.grams import add_run
from sota_transformer.data.near import Batch, Place, Similar
from sota_transformer.data.shards import (
    HEADER_BYTES,
    SPLITS,
    Shard,
    load_array,
    npy_header,
    sidecar,
)
from sota_transformer.data.sketch import sketch
from sota_transformer.data.sources import EXAMPLES
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.durable import fsync, sha256_file
from sota_transformer.errors import BAD_DATA, SotaError

SHARD_TOKENS = 1 << 26
_KNOWN_DOCUMENTS = 512  # existing documents read at a time for an append
NEAR_DUPLICATE = "near-duplicate"
_BEGINNING = 16  # tokens of a document to show as an example


class SeenHashes:
    """A growing set of document hashes in 16 bytes each: sorted runs."""

    def __init__(self) -> None:
        self._runs: list[NDArray[np.void]] = []

    def new(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of these distinct hashes, (n, 2), are new: (n,). Records them as seen."""
        keys = np.ascontiguousarray(hashes).view(f"S{HASH_BYTES}").reshape(-1)
        fresh = np.ones(len(keys), bool)
        for run in self._runs:
            at = np.searchsorted(run, keys)
            at[at == len(run)] = 0
            fresh &= run[at] != keys
        add_run(self._runs, np.sort(keys[fresh]))
        return fresh


class SplitWriter:
    """The shards of one split, each closed at the first document end past SHARD_TOKENS."""

    def __init__(self, folder: Path, split: str) -> None:
        self.before = 0  # existing shards of the folder, for an append
        self.shards: list[str] = []
        self.counts = {"tokens": 0, "documents": 0, "text_bytes": 0}
        self.files: dict[str, Future[dict[str, Any]]] = {}
        self._folder, self._split = folder, split
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._file: Any = None
        self._ends: list[NDArray[np.uint64]] = []
        self._hashes: list[NDArray[np.uint64]] = []
        self._held = 0

    def add(self, encoded: Encoded, keep: NDArray[np.bool_]) -> None:
        """Append the kept documents of a unit, in order."""
        chosen = np.flatnonzero(keep)
        while len(chosen):
            # As many documents as fit into the shard; the last one may overshoot.
            tokens = np.cumsum(encoded.lengths[chosen], dtype=np.int64)
            count = int(np.searchsorted(tokens, SHARD_TOKENS - self._held, "left")) + 1
            self._append(encoded, chosen[:count])
            if self._held >= SHARD_TOKENS:
                self._finish()
            chosen = chosen[count:]

    def _append(self, encoded: Encoded, chosen: NDArray[np.int64]) -> None:
        """Append some documents of a unit, in order, to the open shard."""
        file = self._file or self._open()
        ends = np.cumsum(encoded.lengths, dtype=np.int64)
        breaks = np.flatnonzero(np.diff(chosen) > 1)
        for first, last in zip(
            chosen[np.append(0, breaks + 1)].tolist(),
            chosen[np.append(breaks, len(chosen) - 1)].tolist(),
            strict=True,
        ):
            start = ends[first] - encoded.lengths[first]
            file.write(encoded.tokens[start : ends[last]].data)
        lengths = encoded.lengths[chosen].astype(np.uint64)
        self._ends.append(np.cumsum(lengths) + np.uint64(self._held))
        self._hashes.append(encoded.hashes[chosen])
        added = int(lengths.sum())
        self._held += added
        self.counts["tokens"] += added
        self.counts["documents"] += len(chosen)
        self.counts["text_bytes"] += int(encoded.text_bytes[chosen].sum(dtype=np.int64))

    def _open(self) -> Any:
        """Open the next shard, leaving room for its header."""
        self.shards.append(f"{self._split}-{self.before + len(self.shards):05d}.npy")
        self._file = (self._folder / self.shards[-1]).open("xb", buffering=1 << 20)
        self._file.write(bytes(HEADER_BYTES))
        return self._file

    def _finish(self) -> None:
        """Close the open shard; a thread writes the header, syncs and hashes it, which is slow."""
        if self._file is None:
            return
        shard, finish = self.shards[-1], self._thread.submit
        self.files[shard] = finish(_seal, self._folder / shard, self._file, self._held)
        for kind, parts in (("ends", self._ends), ("hashes", self._hashes)):
            name, array = sidecar(shard, kind), np.concatenate(parts)
            self.files[name] = finish(_write_array, self._folder / name, array)
        self._file, self._ends, self._hashes, self._held = None, [], [], 0

    def close(self) -> dict[str, dict[str, Any]]:
        """Finish the last shard, wait until all files are durable; their manifest entries."""
        self._finish()
        with self._thread:
            return {name: entry.result() for name, entry in self.files.items()}

    def abandon(self) -> None:
        """Give up after an error."""
        self._thread.shutdown(cancel_futures=True)
        if self._file is not None:
            with suppress(OSError):
                self._file.close()


def _seal(path: Path, file: Any, tokens: int) -> dict[str, Any]:
    """Write the header of a finished shard, sync and hash it; its manifest entry."""
    with file, ThreadPoolExecutor(1, thread_name_prefix="sync") as aside:
        file.flush()
        os.pwrite(file.fileno(), npy_header("<u2", (tokens,)), 0)
        durable = aside.submit(fsync, file.fileno())
        digest = sha256_file(path)  # while the disk syncs
        durable.result()
    return {"bytes": HEADER_BYTES + 2 * tokens, "sha256": digest}


def _write_array(path: Path, array: NDArray[Any]) -> dict[str, Any]:
    """Write an array as a durable .npy file; its manifest entry."""
    data = npy_header(array.dtype.str, array.shape) + array.tobytes()
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


class Merger:
    """Takes units in order, writes both splits and collects their part of the manifest."""

    def __init__(self, folder: Path, val_below: int, inputs: int, near_dedup: float) -> None:
        """Documents whose hash is below `val_below` go to validation."""
        self.rejects, self._seen = Rejects(), SeenHashes()
        self._again: list[NDArray[np.uint16]] = []  # first tokens of the first exact duplicates
        self._similar = Similar(near_dedup) if near_dedup else None
        self.splits = {split: SplitWriter(folder, split) for split in SPLITS}
        self._val_below = np.uint64(val_below)
        self.by_input = np.zeros((inputs, 3), np.int64)  # documents, text bytes, tokens

    def load_existing(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Append to a prepared folder: continue its shards and skip documents it contains."""
        for split, writer in self.splits.items():
            shards = manifest["splits"][split]["shards"]
            writer.before = len(shards)
            for name in shards:
                self._seen.new(load_array(folder, sidecar(name, "hashes"), manifest))
                if self._similar is None:
                    continue
                tokens = Shard(folder, name, manifest)
                ends = load_array(folder, sidecar(name, "ends"), manifest).astype(np.int64)
                if (np.diff(ends, prepend=0) <= 0).any() or not ends[-1:] == tokens.items:
                    raise SotaError(f"{folder / name}: does not match its .ends file", BAD_DATA)
                for at in range(0, len(ends), _KNOWN_DOCUMENTS):
                    start = int(ends[at - 1]) if at else 0
                    part = ends[at : at + _KNOWN_DOCUMENTS]
                    lengths = np.diff(part, prepend=start).astype(np.uint32)
                    ids = tokens.read(start, int(part[-1]))
                    place = Place(folder / name, HEADER_BYTES + 2 * start)
                    self._similar.add_existing(Batch(lengths, *sketch(ids, lengths), place))

    def add(self, encoded: Encoded) -> None:
        """Merge the next unit."""
        self.rejects.merge(encoded.rejects.entries)
        fresh = self._seen.new(encoded.hashes)
        if not fresh.all():
            self._note_duplicates(encoded, np.flatnonzero(~fresh))
        if self._similar is not None:
            assert encoded.place is not None
            batch = Batch(encoded.lengths, encoded.keys, encoded.marks, encoded.place)
            before, fresh = fresh, self._similar.new(batch, fresh)
            if dropped := int((before & ~fresh).sum()):
                self.rejects.add(NEAR_DUPLICATE, count=dropped)
        val = encoded.hashes[:, 0] < self._val_below
        self.splits["train"].add(encoded, fresh & ~val)
        self.splits["val"].add(encoded, fresh & val)
        rows = len(self.by_input)
        sums = (np.ones(len(fresh)), encoded.text_bytes, encoded.lengths)
        for column, values in enumerate(sums):
            counted = np.bincount(encoded.inputs[fresh], values[fresh], rows)
            self.by_input[:, column] += counted.astype(np.int64)

    def _note_duplicates(self, encoded: Encoded, again: NDArray[np.int64]) -> None:
        """Record exact duplicates of documents in other units; their files are unknown here."""
        self.rejects.add(DUPLICATE, count=len(again))
        starts = np.cumsum(encoded.lengths, dtype=np.int64) - encoded.lengths
        for document in again[: EXAMPLES - len(self._again)].tolist():
            start = starts[document]
            ids = encoded.tokens[start : start + encoded.lengths[document] - 1]
            self._again.append(ids[:_BEGINNING].copy())

    def close(self) -> dict[str, Any]:
        """Make all files durable; the part of the manifest that describes the documents."""
        files: dict[str, dict[str, Any]] = {}
        for writer in self.splits.values():
            files |= writer.close()
        decode = Tokenizer().decode
        for jaccard, a, b in self._similar.examples if self._similar else ():
            first, second = (decode(ids[:_BEGINNING], cut=True) for ids in (a, b))
            pair = f"{first!r} is like {second!r}"
            self.rejects.add(NEAR_DUPLICATE, f"{jaccard:.2f}: {pair}", count=0)
        for ids in self._again:
            self.rejects.add(DUPLICATE, f"begins {decode(ids, cut=True)!r}", count=0)
        splits = {
            split: {"shards": writer.shards, **writer.counts}
            for split, writer in self.splits.items()
        }
        rejects = dict(sorted(self.rejects.entries.items()))
        return {"files": files, "splits": splits, "rejects": rejects}

    def abandon(self) -> None:
        """Give up after an error."""
        for writer in self.splits.values():
            writer.abandon()
