"""Near-duplicates found by `--near-dedup` and by datatrove's minhash, compared as sets:

    pip install --no-deps datatrove==0.10.1 loguru humanize     # it must not change other versions
    python benchmarks/near_dedup.py --folder /tmp/near --megabytes 20

The text is the Python sources on this machine, which contain natural copies, plus edited copies of
some of them. datatrove pairs documents that agree in one of 14 buckets of 8 hashes and verifies
nothing, so each of its pairs is checked against the true Jaccard index of the documents' token
5-grams, and pairs below the threshold do not count. We missed a pair that counts if we kept both
documents. Conversely, datatrove missed a document that we dropped if none of its pairs links that
document, directly or through others, to an earlier one.

datatrove runs in two ways: on the same GPT-2 tokens, and on words after its own normalization
(lower case, no punctuation), split at whitespace because its English word splitter needs spaCy.
"""

import argparse
import json
import random
import shutil
import struct
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from corpus import sources
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupBuckets, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig
from datatrove.utils.text import TextNormConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from sota_transformer.data.prepare import prepare
from sota_transformer.data.shards import SPLITS
from sota_transformer.data.tokenizer import Tokenizer
from sota_transformer.options import Prepare

GRAM = 5
TOKENIZER = Tokenizer()
EDITED = 0.15  # share of documents that also appear as an edited copy
Pair = tuple[int, int]


class Tokens(WordTokenizer):
    """GPT-2 tokens as words, so that datatrove's 5-grams are ours."""

    def word_tokenize(self, text: str) -> list[str]:
        return [str(token) for token in TOKENIZER.encode(text)]

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


class Words(Tokens):
    """Whitespace-separated words."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()


def corpus(folder: Path, megabytes: int) -> list[str]:
    """Distinct documents in random order, some of them edited copies of others."""
    path = folder / f"near-{megabytes}.jsonl"
    if not path.exists():
        rng, left, texts = random.Random(5), megabytes * 10**6, []
        for text in sources(None):
            if len(text) > 40_000:
                continue
            texts.append(text)
            if rng.random() < EDITED:
                texts.append(edited(text, rng))
            left -= len(text)
            if left < 0:
                break
        texts = list(dict.fromkeys(texts))
        rng.shuffle(texts)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def edited(text: str, rng: random.Random) -> str:
    """A copy with up to an eighth of its words replaced, at random places."""
    words = text.split(" ")
    for _ in range(max(1, int(len(words) * rng.random() / 8))):
        words[rng.randrange(len(words))] = rng.choice(words)
    return " ".join(words)


def theirs(texts: list[str], folder: Path, words: WordTokenizer, norm: TextNormConfig) -> set[Pair]:
    """Pairs reported by datatrove's first two stages, earlier document first."""
    shutil.rmtree(folder, ignore_errors=True)
    hashed = HashConfig(hash_fc="sha1")  # its xxhash code fails with xxhash 4
    config = MinhashConfig(n_grams=GRAM, norm_config=norm, hash_config=hashed)
    signatures, pairs = str(folder / "signatures"), folder / "pairs"
    documents = (Document(text=text, id=str(i)) for i, text in enumerate(texts))
    MinhashDedupSignature(signatures, config, language=words).run(documents)
    for bucket in range(config.num_buckets):
        stage = MinhashDedupBuckets(signatures, str(pairs), config=config)
        stage.run(None, bucket, config.num_buckets)
    found = set()
    for path in pairs.glob("*.dups"):
        for _, a, _, b in struct.iter_unpack("<4I", path.read_bytes()):
            found.add((min(a, b), max(a, b)))
    return found


def ours(path: Path, out: Path, texts: list[str], threshold: float) -> set[int]:
    """Documents dropped by `sota prepare --near-dedup`."""
    shutil.rmtree(out, ignore_errors=True)
    prepare(Prepare(inputs=(str(path),), out=out, near_dedup=threshold))
    manifest, kept = json.loads((out / "manifest.json").read_text()), Counter()
    for split in SPLITS:
        for name in manifest["splits"][split]["shards"]:
            ids = np.load(out / name)
            start = 0
            for end in np.load(out / name.replace(".npy", ".ends.npy")).tolist():
                kept[TOKENIZER.decode(ids[start : end - 1])] += 1
                start = end
    return {i for i, text in enumerate(texts) if not kept[text]}


class Jaccard:
    """True Jaccard index of the token 5-grams of two documents."""

    def __init__(self, texts: list[str]) -> None:
        self._texts, self._grams = texts, {}

    def grams(self, document: int) -> set[bytes]:
        if document not in self._grams:
            ids = np.array(TOKENIZER.encode(self._texts[document]), np.uint16)
            self._grams[document] = {
                ids[i : i + GRAM].tobytes() for i in range(len(ids) - GRAM + 1)
            }
        return self._grams[document]

    def __call__(self, pair: Pair) -> float:
        a, b = map(self.grams, pair)
        return len(a & b) / len(a | b) if a or b else 0.0


def linked(pairs: Iterable[Pair]) -> set[int]:
    """Documents that some pair links to an earlier one, directly or through others."""
    parent: dict[int, int] = {}

    def root(x: int) -> int:
        while parent.setdefault(x, x) != x:
            x = parent[x]
        return x

    for a, b in pairs:
        a, b = sorted((root(a), root(b)))
        parent[b] = a
    return {x for x in parent if root(x) != x}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--threshold", type=float, default=0.8)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    texts = corpus(options.folder, options.megabytes)
    jaccard = Jaccard(texts)
    print(f"{len(texts):,} documents, {sum(len(t.encode()) for t in texts) / 1e6:.1f} MB")
    path = options.folder / f"near-{options.megabytes}.jsonl"
    dropped = ours(path, options.folder / "ours", texts, options.threshold)
    print(f"ours: {len(dropped):,} dropped")
    raw = TextNormConfig(*(False for _ in TextNormConfig.__dataclass_fields__))
    for name, words, norm in (
        ("on our tokens", Tokens(), raw),
        ("on its words", Words(), TextNormConfig()),
    ):
        began = time.process_time()
        pairs = theirs(texts, options.folder / "theirs", words, norm)
        seconds = time.process_time() - began
        true = {pair for pair in pairs if jaccard(pair) >= options.threshold}
        missed = {pair for pair in true if not set(pair) & dropped}
        unseen = dropped - linked(pairs)
        print(
            f"datatrove {name}: {len(pairs):,} pairs, {len(true):,} of them at or above "
            f"{options.threshold}, linking {len(linked(true)):,} documents to earlier ones; "
            f"{seconds:.1f} CPU s\n  missed by us: {len(missed):,} pairs; dropped by us but not "
            f"linked by datatrove: {len(unseen):,}"
        )
        for pair in sorted(missed)[:5]:
            print(f"  missed: {pair}, {jaccard(pair):.4f}")


if __name__ == "__main__":
    main()
