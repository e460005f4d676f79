"""Ids identical to tiktoken and transformers on any text; decoding inverts them."""

import base64
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from sota_transformer.data.tokenizer import (
    _PATTERN,
    EOT,
    Encoder,
    Tokenizer,
    _rank_file,
    _token_table,
    utf8,
)

HOSTILE = [
    "",
    " ",
    "\n" * 500,
    " \t\r\n\x0b\x0c\x1c\x85\xa0\u1680\u180e\u2003\u2028\u202f\u205f\u3000\ufeff" * 20,
    "I'll we've don't DON'T 's 'S it's\u2019s",
    "0123456789 ١٢٣ Ⅻ ½ ²",
    "<|endoftext|> <|pad|> a<|endoftext|>b",
    "\U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467 é e\u0301 ﬃ ß İ",
    "日本語のテキスト 한국어 العربية हिन्दी русский",
    "\x00\x01\x7f\u0080\uffff\U0010ffff",
    "a" * 10_000,
    "ab" * 5_000 + "  " * 5_000,
    "x\u00a0\u00a0\u00a0y" * 100,
]


@pytest.fixture(scope="module")
def reference() -> tiktoken.Encoding:
    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in _rank_file().splitlines())
    }
    return tiktoken.Encoding("gpt2", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={})


@pytest.fixture(scope="module", params=["gigatoken", "tiktoken"])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "tiktoken":
            patch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
        made = Encoder()
    assert made.kind == request.param
    return made


def test_known_ids() -> None:
    tokenizer = Tokenizer()
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert (EOT, tokenizer.pad) == (50256, 50257)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_as_tiktoken(
    encoder: Encoder, reference: tiktoken.Encoding, text: str
) -> None:
    ids = encoder(utf8(text)).tolist()
    assert ids == reference.encode_ordinary(text)
    assert Tokenizer().decode(ids) == text


def test_any_text_as_tiktoken(reference: tiktoken.Encoding) -> None:
    tokenizer = Tokenizer()

    @settings(max_examples=500, deadline=None)
    @given(st.text(max_size=200))
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert ids == reference.encode_ordinary(text)
        assert tokenizer.decode(ids) == text

    check()


def test_every_assigned_character_as_tiktoken(reference: tiktoken.Encoding) -> None:
    """Every 7th code point of all planes, between letters, digits, spaces and punctuation."""
    encode = Tokenizer().encode
    points = [chr(c) for c in range(0, 0x110000, 7) if not 0xD800 <= c < 0xE000]
    for context in ("a{}b", " {}", "1{} ", "{}{}!", "\n{}\n"):
        text = "\n".join(context.replace("{}", point) for point in points)
        assert encode(text) == reference.encode_ordinary(text)


def test_as_transformers(tmp_path: Path) -> None:
    """The fast GPT-2 tokenizer of transformers, built from our table, without special tokens."""
    from transformers import GPT2TokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens, letters = _token_table(), bytes_to_unicode()
    spelled = ["".join(letters[byte] for byte in token) for token in tokens]
    with np.load(
        Path(sys.modules[Tokenizer.__module__].__file__ or "").parent / "gpt2.npz"
    ) as table:
        merges = [
            f"{spelled[a]} {spelled[b]}"
            for a, b in zip(table["left"].tolist(), table["right"].tolist(), strict=True)
        ]
    vocab = {token: rank for rank, token in enumerate(spelled)} | {"<|endoftext|>": 50256}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    theirs = GPT2TokenizerFast(
        vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt")
    )
    for text in HOSTILE:
        if "<|endoftext|>" not in text:  # known to inject the special id there
            assert Tokenizer().encode(text) == theirs.encode(text)


def test_long_runs_are_not_slow(encoder: Encoder) -> None:
    """Nor limited by a regular expression: tiktoken's fails at a million spaces."""
    text = b"x%sy%s\x1c<|endoftext|>%s" % (b"\xc2\xa0" * 5000, b" " * 1_000_000, b"\n" * 5000)
    assert encoder(text).tolist() == Encoder()(text).tolist()
    for text in (b"a" * 1_000_000, "字".encode() * 300_000, b" " * 1_000_000):
        started = time.process_time()
        encoder(text)
        assert time.process_time() - started < 1.0


def test_renewing_the_encoder_for_memory_keeps_the_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "sota_transformer.data.tokenizer"
    monkeypatch.setattr(f"{module}._FIRST_LOOK_BYTES", 100)
    monkeypatch.setattr(f"{module}._LOOK_BYTES", 100)
    monkeypatch.setattr(f"{module}._BLIND_BYTES", 100)
    much = 1 << 40  # memory at the first look belongs to readers: an open parquet file
    for at_start, at_looks, renewed in (
        (10, [10, 10, 10], 0),
        (10, [10, much, 10, much, 10], 2),  # at each look, and after each renewal
        (10, [10, much, much, much], 1),  # what then remains belongs to readers, too
        (10, [much, much, much], 0),
        (0, [0, 0, 0, 0, 0], 2),
    ):
        monkeypatch.setattr(f"{module}._resident", lambda at_start=at_start: at_start)
        encode = Encoder()
        sizes, ids, encoders = iter(at_looks), set(), [encode._encode]
        monkeypatch.setattr(f"{module}._resident", lambda sizes=sizes: next(sizes))
        for _ in range(4):
            ids.add(tuple(encode(b"The same text again and again. " * 4)))
            encoders.append(encode._encode)
        assert len(ids) == 1
        assert len(set(map(id, encoders))) == 1 + renewed


def test_falls_back_if_gigatoken_is_missing_or_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "sota_transformer.data.tokenizer._gigatoken"
    monkeypatch.setattr(module, lambda: lambda text: np.array([1], np.uint32))
    assert Encoder().kind == "tiktoken"

    # Not installed; no disk space for its rank file; no /proc; arguments of another version.
    full, unread = OSError(28, "No space left on device"), RuntimeError("Failed to read /dev/fd/3")
    for error in (ImportError(), full, unread, TypeError("3 given")):

        def fails(error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(module, fails)
        assert Encoder().kind == "tiktoken"
    monkeypatch.setattr(module, lambda: lambda text: [15496])
    assert Encoder().kind == "tiktoken"


def test_a_kill_while_gigatoken_reads_its_ranks_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Seen: Ctrl-C in the first second of `sota prepare` left sota-ranks-* in TMPDIR."""
    gigatoken = pytest.importorskip("gigatoken.gigatoken_rs")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    read, there = gigatoken.BPETokenizer, list[Path]()

    def from_tiktoken(*given: object) -> object:
        there.extend(tmp_path.iterdir())
        return read.from_tiktoken(*given)

    reader = SimpleNamespace(from_tiktoken=from_tiktoken)
    monkeypatch.setattr(gigatoken, "BPETokenizer", reader)
    assert Encoder()(b"hello world").tolist() == [31373, 995]
    assert there == []


def test_decoding_edges() -> None:
    tokenizer = Tokenizer()
    assert tokenizer.decode([50256, 15496, 50257]) == "Hello"
    assert tokenizer.decode([*tokenizer.encode("é")[:1], 8582]).endswith("\ufffd")
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    ids = tokenizer.encode("鬱蒼")
    texts = [tokenizer.decode(ids[:count], cut=True) for count in range(len(ids) + 1)]
    assert sorted({*texts}) == ["", "鬱", "鬱蒼"] and len(texts) > 4
    assert tokenizer.decode([8582, 64], cut=True) == "\ufffda"  # wrong, not cut
    for wrong in (-1, 50258):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.decode([wrong])


def test_token_bytes_measure_the_text() -> None:
    tokenizer, text = Tokenizer(), "Was it né? 日本!" * 10
    ids = tokenizer.encode(text)
    assert tokenizer.token_bytes.shape == (50258,)
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes[[50256, 50257]].tolist() == [0, 0]


def test_imports_no_torch() -> None:
    code = (
        "import sys; from sota_transformer.data import loader, prepare, shards, tokenizer\n"
        "tokenizer.Tokenizer().encode('x'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
