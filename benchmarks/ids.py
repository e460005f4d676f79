"""`sota prepare` checked against tiktoken, document by document:

    python benchmarks/ids.py --folder /tmp/ids --books ../shared/corpora/books.jsonl.zst

Books and Python sources are cut into `--documents` distinct passages, a tenth of them with unusual
text appended (other scripts, whitespace, emoji, special tokens spelled out). They are prepared as
usual, and each document on disk must equal tiktoken's encoding of its text.
"""

import argparse
import itertools
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiktoken
from corpus import sources
from tiktoken_ext.openai_public import r50k_pat_str

from sota_transformer.data.prepare import prepare
from sota_transformer.data.shards import SPLITS
from sota_transformer.data.tokenizer import Tokenizer, _token_table
from sota_transformer.options import Prepare

TAILS = [
    "日本語の文章、한국어 Русский العربية हिन्दी",
    "\U0001f600\U0001f469\u200d\U0001f4bb\u00a0\u2003 \u3000x \t\t\r\n  y  ",
    "<|endoftext|> <|pad|>'s 'LL don't 12345\u0664\u0665 \u00b2\u00be",
    "a" * 300 + " " * 300 + "\n" * 20 + "=" * 200,
]


def passages(books: Path | None, count: int) -> Iterator[str]:
    """`count` distinct documents of about 500 characters."""
    rng, made = random.Random(3), 0
    for text in itertools.cycle(sources(books)):
        for start in range(rng.randrange(100), len(text), 500):
            tail = rng.choice(TAILS) if rng.random() < 0.1 else ""
            yield f"{made} {text[start : start + 500]}{tail}"
            made += 1
            if made == count:
                return


def reference() -> tiktoken.Encoding:
    """tiktoken with its own pattern; our ranks have the hash that it requires of its download."""
    ranks = {token: rank for rank, token in enumerate(_token_table())}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})


def compare(out: Path, expected: set[str]) -> tuple[int, int, int]:
    """(documents, tokens, documents that differ) in `out`."""
    core, tokenizer, found, tokens, wrong = reference(), Tokenizer(), 0, 0, 0
    manifest = json.loads((out / "manifest.json").read_text())
    for split in SPLITS:
        for name in manifest["splits"][split]["shards"]:
            ids, start = np.load(out / name), 0
            for end in np.load(out / name.replace(".npy", ".ends.npy")).tolist():
                own = ids[start : end - 1].tolist()
                text = tokenizer.decode(own)
                wrong += text not in expected or core.encode_ordinary(text) != own
                found, tokens, start = found + 1, tokens + len(own), end
    return found, tokens, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--books", type=Path)
    parser.add_argument("--documents", type=int, default=100_000)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    source, out = options.folder / "in.jsonl", options.folder / "data"
    expected = set(passages(options.books, options.documents))
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in sorted(expected)))
    shutil.rmtree(out, ignore_errors=True)
    prepare(Prepare(inputs=(str(source),), out=out))
    found, tokens, wrong = compare(out, expected)
    print(f"{found:,} documents of {len(expected):,}, {tokens:,} tokens: {wrong:,} differ")
    return int(bool(wrong) or found != len(expected))


if __name__ == "__main__":
    raise SystemExit(main())
