"""Make `src/sota_transformer/data/gpt2.npz`, the GPT-2 vocabulary as figures.

    pip download --no-deps --dest /tmp/wheels mlx-whisper
    python tools/make_gpt2_table.py /tmp/wheels/mlx_whisper-*.whl

The wheel carries the published rank file; its SHA-256 is checked before anything is taken from it.
The result holds the 256 single bytes in rank order and, for each further token, the two earlier
tokens that merge into it: all that there is to the vocabulary.
"""

import base64
import hashlib
import io
import itertools
import sys
import zipfile
from pathlib import Path

import numpy as np

RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
MEMBER = "mlx_whisper/assets/gpt2.tiktoken"
TARGET = Path(__file__).parent.parent / "src/sota_transformer/data/gpt2.npz"


def parts(token: bytes, ranks: dict[bytes, int]) -> tuple[int, int]:
    """The two ids whose merge makes `token`: byte-pair encode it with the lower ranks only."""
    pieces, limit = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(pieces) > 2:
        merged = [ranks.get(a + b, limit) for a, b in itertools.pairwise(pieces)]
        at = merged.index(min(merged))
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return ranks[pieces[0]], ranks[pieces[1]]


def main() -> None:
    """Read the wheel named on the command line, write the table."""
    text = zipfile.ZipFile(sys.argv[1]).read(MEMBER)
    if hashlib.sha256(text).hexdigest() != RANKS_SHA256:
        sys.exit(f"{MEMBER} in {sys.argv[1]} is not the published GPT-2 rank file")
    lines = [line.split() for line in text.splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    tokens = sorted(ranks, key=lambda token: ranks[token])
    alphabet = np.frombuffer(b"".join(tokens[:256]), np.uint8)
    merges = np.array([parts(token, ranks) for token in tokens[256:]], np.uint16).T
    buffer = io.BytesIO()
    np.savez_compressed(buffer, alphabet=alphabet, left=merges[0], right=merges[1])
    TARGET.write_bytes(buffer.getvalue())
    print(f"{TARGET}: {len(tokens):,} ranks, {len(buffer.getvalue()):,} bytes")


if __name__ == "__main__":
    main()
