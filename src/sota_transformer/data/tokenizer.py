"""GPT-2's byte-level BPE: text to ids and back, offline, identical to the published encoding.

1. `gpt2.npz` holds 256 bytes and 50,000 merges; `_token_table` rebuilds every token's bytes.
2. `_rank_file` rebuilds the rank file from these tokens; its SHA-256 must be the published one.
3. The encoder is gigatoken if it works on this machine, else tiktoken: the same ids, but slower.

Special tokens inside a text are ordinary text; callers add end-of-text by id.
"""

import base64
import codecs
import hashlib
import re
import resource
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sota_transformer.config import GPT2_VOCAB, VOCAB
from sota_transformer.errors import BAD_DATA, SotaError

RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
EOT = GPT2_VOCAB - 1
_TABLE = Path(__file__).parent / "gpt2.npz"
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_SPACES = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{4096,}")
# Ids fixed when the table was made: contractions, spaces, newlines, emoji, a special token as text.
_KNOWN = (
    ("Hello world", [15496, 995]),
    ("I'll  go\n\n\tto x", [40, 1183, 220, 467, 628, 197, 1462, 2124]),
    ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
    (
        "\u00a0\u3000\U0001f642 12345\r\n ",
        [1849, 5099, 222, 8582, 25081, 17031, 2231, 201, 198, 220],
    ),
)
_FIRST_LOOK_BYTES, _LOOK_BYTES, _BLIND_BYTES = 8 << 20, 16 << 20, 96 << 20  # see `Encoder`
_GROWN_BYTES = 64 << 20

Ids = NDArray[np.integer[Any]]
Encode = Callable[[bytes], NDArray[np.uint32]]


@cache
def _token_table() -> list[bytes]:
    """Bytes of each of the 50,256 text tokens, by id."""
    with np.load(_TABLE, allow_pickle=False) as table:
        alphabet, left, right = table["alphabet"], table["left"], table["right"]
    tokens = [bytes([byte]) for byte in alphabet.tolist()]
    for a, b in zip(left.tolist(), right.tolist(), strict=True):
        tokens.append(tokens[a] + tokens[b])
    return tokens


@cache
def _rank_file() -> bytes:
    """The published rank file, rebuilt. SotaError 65 unless it is identical byte for byte."""
    encode = base64.b64encode
    text = b"".join(b"%b %d\n" % (encode(t), rank) for rank, t in enumerate(_token_table()))
    if hashlib.sha256(text).hexdigest() != RANKS_SHA256:
        raise SotaError(f"{_TABLE} is not GPT-2's table; reinstall the package", BAD_DATA)
    return text


def _gigatoken() -> Encode:
    """Encoder of UTF-8. It reads its ranks from a file, so they are written to a temporary
    one, which has no name: a process killed meanwhile leaves nothing behind.
    """
    from gigatoken.gigatoken_rs import BPETokenizer

    with tempfile.TemporaryFile() as file:
        file.write(_rank_file())
        file.seek(0)  # needed where /dev/fd shares the file position, as on macOS
        return BPETokenizer.from_tiktoken(f"/dev/fd/{file.fileno()}", "gpt2", {}).encode


def _tiktoken() -> Encode:
    """The same encoder from tiktoken."""
    from tiktoken import Encoding

    _rank_file()  # for its check
    ranks = {token: rank for rank, token in enumerate(_token_table())}
    core = Encoding("gpt2", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={})
    plain = partial(core.encode_to_numpy, disallowed_special=())

    def encode(data: bytes) -> NDArray[np.uint32]:
        text = data.decode()
        try:
            return plain(text)
        except ValueError:  # its regex hits the backtracking limit on a million spaces
            # The last space of a run belongs to what follows, so the text can be cut before it.
            ends = (run.end() for run in _SPACES.finditer(text))
            cuts = [0, *(end - 1 for end in ends if end < len(text)), len(text)]
            return np.concatenate([plain(text[a:b]) for a, b in pairwise(cuts)])

    return encode


class Encoder:
    """Encodes one document after another, with bounded memory.

    gigatoken caches every word it meets, forever, and is a fifth slower until it has cached the
    common ones. So the encoder is replaced only when this process has grown much beyond its size
    after the first few MB of text, by when readers and writers have allocated what they need.
    Memory that a replacement does not free belongs to them too and raises the limit. The size is
    checked often; where the system does not report it, the encoder is replaced after so much text
    that rebuilding the cache costs little by comparison.
    """

    def __init__(self) -> None:
        self.kind, self._encode = _ready.pop() if _ready else _choose()
        self._seen, self._look = 0, _FIRST_LOOK_BYTES
        self._limit: int | None = None  # resident bytes; 0 if unknown, which is always exceeded

    def __call__(self, text: bytes) -> NDArray[np.uint32]:
        """Ids of one document of valid UTF-8, without end-of-text: (n,)."""
        if self._seen > self._look and self.kind == "gigatoken":
            now = _resident()
            if self._limit is None:
                self._limit = now and now + _GROWN_BYTES
            elif now >= self._limit:
                self._encode = _gigatoken()
                now = _resident()  # without the old encoder's cache
                self._limit = now and max(self._limit, now + _GROWN_BYTES)
            self._seen, self._look = 0, _LOOK_BYTES if self._limit else _BLIND_BYTES
        self._seen += len(text)
        return self._encode(text)


def _resident() -> int:
    """Resident memory of this process in bytes; 0 if the system does not report it (non-Linux)."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


_ready: list[tuple[str, Encode]] = []


def warm_up() -> None:
    """Create the encoder for the next `Encoder()` in this process or a child forked from it."""
    _ready.append(_choose())


def _choose() -> tuple[str, Encode]:
    """The first encoder that gives the right ids, and its name. SotaError 65 if none does."""
    for name, make in (("gigatoken", _gigatoken), ("tiktoken", _tiktoken)):
        try:
            encode = make()
            works = all(encode(text.encode()).tolist() == ids for text, ids in _KNOWN)
        except (ImportError, OSError, RuntimeError, TypeError, ValueError, AttributeError):
            continue  # not installed, no space for its file, no /proc, a changed API (gigatoken#42)
        if works:
            return name, encode
    raise SotaError(
        "no working encoder; run `pip install gigatoken tiktoken` and try again", BAD_DATA
    )


class Tokenizer:
    """GPT-2's 50,257 ids and one more for padding."""

    pad = VOCAB - 1

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder()

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        """Length in bytes of each id's text: (VOCAB,); 0 for end-of-text and pad."""
        return np.array([len(token) for token in _token_table()] + [0, 0], np.int64)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, specials as ordinary text; a lone surrogate becomes U+FFFD."""
        return self._encoder(utf8(text)).tolist()

    def decode_bytes(self, ids: Sequence[int] | Ids) -> bytes:
        """Bytes of the ids; end-of-text and pad give none. ValueError for an unknown id."""
        table, values = _token_table(), [int(i) for i in ids]
        if wrong := [i for i in values if not 0 <= i < VOCAB]:
            raise ValueError(f"token id {wrong[0]} is outside the vocabulary of {VOCAB:,}")
        return b"".join(table[i] for i in values if i < EOT)

    def decode(self, ids: Sequence[int] | Ids, *, cut: bool = False) -> str:
        """Text of the ids; invalid UTF-8 becomes U+FFFD. `cut`: more ids follow, so a character
        that lacks its end is left out; a Chinese one often takes two or three.
        """
        return codecs.utf_8_decode(self.decode_bytes(ids), "replace", not cut)[0]


def utf8(text: str) -> bytes:
    """UTF-8 of a text; surrogate pairs are joined, a lone surrogate becomes U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
