"""The last step of a preparation: write the manifest and make the result visible.

A new folder is renamed into place. An append moves its new shards in next to the old ones, where
readers ignore them, and then replaces the manifest: readers see the old set or the new one.
"""

import hashlib
from pathlib import Path
from typing import Any

from sota_transformer.config import VOCAB
from sota_transformer.data.encode import HASH_RULE, Rejects
from sota_transformer.data.shards import FORMAT
from sota_transformer.data.tokenizer import RANKS_SHA256
from sota_transformer.durable import MANIFEST, canonical_json, fsync_folder, seal, write_file


def complete(part: dict[str, Any], val_below: int) -> dict[str, Any]:
    """A full manifest from the parts that the merger and the inputs provide."""
    return part | {
        "format": FORMAT,
        "vocab_size": VOCAB,
        "tokenizer": RANKS_SHA256,
        "fingerprint": fingerprint(part),
        "dtype": "uint16",
        "end_of_text": "after each document",
        "split_rule": {"hash": HASH_RULE, "val_below": val_below},
    }


def fingerprint(part: dict[str, Any]) -> str:
    """Hash of the content: the shards' bytes in order, regardless of the inputs' names."""
    content = {"files": part["files"], "splits": part["splits"], "tokenizer": RANKS_SHA256}
    return hashlib.sha256(canonical_json(content)).hexdigest()


def commit_new(shards: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a finished folder and rename it into place."""
    write_file(shards / MANIFEST, canonical_json(seal(manifest)))
    fsync_folder(shards)
    shards.rename(out)
    fsync_folder(out.parent)


def commit_append(shards: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Move new shards into a prepared folder, then replace its manifest."""
    for path in sorted(shards.iterdir()):
        path.rename(out / path.name)
    fsync_folder(out)
    write_file(out / MANIFEST, canonical_json(seal(manifest)))


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a prepared folder combined with that of an append."""
    splits = {  # more shards, and larger counts
        name: {key: old["splits"][name][key] + more for key, more in part.items()}
        for name, part in new["splits"].items()
    }
    rejects = Rejects()
    for part in (old, new):
        rejects.merge(part["rejects"])
    both = {"files": old["files"] | new["files"], "splits": splits}
    return {
        **old,
        **both,
        "rejects": rejects.entries,
        "inputs": old["inputs"] + new["inputs"],
        "requests": old["requests"] + new["requests"],
        "fingerprint": fingerprint(both),
    }
