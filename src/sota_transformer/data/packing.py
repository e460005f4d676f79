"""Document-aware windows: document ids for attention masks, and best-fit packing.

`BestFit` packs windows so that each document either starts a window or is whole inside one:
documents longer than a window are cut, and the pieces are packed by best fit (longest first, into
the fullest window with room), as in "Fewer Truncations Improve Language Modeling", arXiv
2404.10830. The pieces of a long document overlap by one token, so that no prediction within a
document is lost; the unused rest of a window is padding, and `padding` is its share of the targets.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sota_transformer.data.shards import Split, TokenWindows
from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.errors import BAD_DATA, SotaError

_READ = 1 << 22


def document_ids(windows: NDArray[Any]) -> NDArray[np.int32]:
    """Index, within its window, of each token's document: the shape of `windows`, (..., T).

    End-of-text belongs to the document it closes. Attention is limited to tokens of equal index.
    """
    closed = np.zeros(windows.shape, np.int32)
    np.cumsum(windows[..., :-1] == EOT, axis=-1, out=closed[..., 1:])
    return closed


def document_ends(windows: TokenWindows) -> NDArray[np.int64]:
    """Where each document of a split ends, in tokens of the whole split: (documents,)."""
    found = []
    for start in range(0, windows.tokens, _READ):
        ids = windows.read(start, min(start + _READ, windows.tokens))
        found.append(np.flatnonzero(ids == EOT).astype(np.int64) + start + 1)
    ends = np.concatenate(found)
    if not len(ends) or ends[-1] != windows.tokens:
        ends = np.append(ends, windows.tokens)  # a foreign stream may end inside a document
    return ends


class BestFit:
    """A split as windows of seq_len + 1 tokens; a document that fits into one is never cut."""

    def __init__(self, folder: Path, split: Split, seq_len: int) -> None:
        """As `TokenWindows`, with the same errors."""
        self._stream = TokenWindows(folder, split, 1)
        self.seq_len, self.tokens = seq_len, self._stream.tokens
        self.documents, self.fingerprint = self._stream.documents, self._stream.fingerprint
        starts, lengths = _pieces(document_ends(self._stream), seq_len + 1)
        starts, lengths = starts[lengths > 1], lengths[lengths > 1]  # a lone token predicts nothing
        if not len(starts):
            raise SotaError(f"{folder}: the {split} split has no text", BAD_DATA)
        order, offsets = _best_fit(lengths, seq_len + 1)
        if int(self._stream.read(self.tokens - 1, self.tokens)[0]) != EOT:
            _move_last_piece(order, offsets)
        self._starts, self._lengths = starts[order], lengths[order]
        self._offsets = offsets
        self.padding = 1 - (int(lengths.sum()) - len(self)) / (len(self) * seq_len)  # of targets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> NDArray[np.uint16]:
        """Window `index`: (seq_len + 1,) uint16, padded with the pad id."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        window = np.full(self.seq_len + 1, Tokenizer.pad, np.uint16)
        at = 0
        for piece in range(self._offsets[index], self._offsets[index + 1]):
            start, length = int(self._starts[piece]), int(self._lengths[piece])
            window[at : at + length] = self._stream.read(start, start + length)
            at += length
        return window


def _pieces(ends: NDArray[np.int64], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(starts, lengths) of all documents; those over `size` in pieces that overlap by one token."""
    starts = np.concatenate([[0], ends[:-1]])
    counts = np.maximum(1, -(-(ends - starts - 1) // (size - 1)))
    owner = np.repeat(np.arange(len(ends)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = starts[owner] + within * (size - 1)
    return first, np.minimum(ends[owner] - first, size)


def _move_last_piece(order: NDArray[np.int64], offsets: NDArray[np.int64]) -> None:
    """Move the stream's last piece to the end of its window: if a foreign stream ends inside a
    document, nothing closes it, and a piece after it would count as the same document.
    """
    at = int(np.flatnonzero(order == len(order) - 1)[0])
    end = int(offsets[np.searchsorted(offsets, at, side="right")])
    order[at:end] = np.roll(order[at:end], -1)


def _best_fit(lengths: NDArray[np.int64], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(pieces by window, start of each window's pieces): longest first, into the tightest fit."""
    by_room: list[list[int]] = [[] for _ in range(size + 1)]
    rooms = 0  # bit r is set while a window with room r exists
    window_of = np.empty(len(lengths), np.int64)
    windows = 0
    order = np.argsort(-lengths, kind="stable")
    for piece in order.tolist():
        length = int(lengths[piece])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            window = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, window, windows = size, windows, windows + 1
        window_of[piece] = window
        if left := room - length:
            by_room[left].append(window)
            rooms |= 1 << left
    placed = np.argsort(window_of[order], kind="stable")
    counts = np.bincount(window_of, minlength=windows)
    return order[placed], np.concatenate([[0], np.cumsum(counts)])
