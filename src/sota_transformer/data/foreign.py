"""Token files of other projects ("foreign"), read in place: raw uint16 ids, maybe with an index.

    nanoGPT      train.bin, val.bin
    llm.c        the same with a header of 256 int32; any number of files per split
    Megatron     x.bin with x.idx
    datatrove    x.ds with x.ds.index

A folder without our manifest is searched for them; a file belongs to validation if its name says
so. Nothing is converted: the files get a manifest in memory, with their own hashes.
"""

import hashlib
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sota_transformer.config import VOCAB
from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.errors import BAD_DATA, SotaError

ENDINGS = (".bin", ".ds")
_LLMC_MAGICS = (20240520, 20240801)
_LLMC_HEADER = 1024
_MEGATRON_MAGIC = b"MMIDIDX\0\0"
_MEGATRON_UINT16 = 8  # its code for the type of the ids, in byte 17, behind the version
_MEGATRON_COUNT = 18  # offset of the number of sequences
_BLOCK = 1 << 24
_VALIDATION = re.compile(r"(?<![a-z])val(id|idation)?(?![a-z])")  # a word: not "medieval"


def foreign_files(folder: Path) -> list[Path]:
    """The token files of a folder, sorted by name, without hidden ones such as macOS' `._NAME`."""
    found = (path for path in folder.iterdir() if path.suffix in ENDINGS)
    return sorted(path for path in found if not path.name.startswith(".") and path.is_file())


def foreign_manifest(folder: Path) -> dict[str, Any]:
    """A manifest of a folder of raw token files; reads every id once.

    SotaError 65 for ids outside GPT-2's vocabulary, another id type, or an impossible file size.
    """
    parts: dict[str, list[Path]] = {"train": [], "val": []}
    for path in foreign_files(folder):
        parts["val" if _VALIDATION.search(path.name.lower()) else "train"].append(path)
    files: dict[str, Any] = {}
    splits: dict[str, Any] = {}
    for split, paths in parts.items():
        sums = {"tokens": 0, "documents": 0, "text_bytes": 0}
        for path in paths:
            start = _first_token(path)
            counts, sha256 = _measure(path, start)
            _check_index(path, counts["tokens"])
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256, "start": start}
            sums = {key: sums[key] + counts[key] for key in sums}
        splits[split] = {"shards": [path.name for path in paths], **sums}
    content = repr([(name, files[name]["sha256"]) for name in sorted(files)])
    return {
        "files": files,
        "splits": splits,
        "fingerprint": hashlib.sha256(content.encode()).hexdigest(),
        "inputs": [],
        "rejects": {},
        "requests": [],
    }


def _first_token(path: Path) -> int:
    """Offset of the first id in bytes."""
    with path.open("rb") as file:
        head = file.read(_LLMC_HEADER)
    if len(head) < _LLMC_HEADER or int.from_bytes(head[:4], "little") not in _LLMC_MAGICS:
        return 0
    version, count = struct.unpack_from("<2i", head, 4)
    if version != 1 or _LLMC_HEADER + 2 * count != path.stat().st_size:
        text = (
            f"{path}: an llm.c file of version {version} whose header says {count:,} ids; expected "
            "version 1, with uint16 ids that fill the file"
        )
        raise SotaError(text, BAD_DATA)
    return _LLMC_HEADER


def _measure(path: Path, start: int) -> tuple[dict[str, int], str]:
    """Numbers of tokens, documents and bytes of text, and the SHA-256, of one file."""
    size = path.stat().st_size
    if (size - start) % 2:
        raise SotaError(f"{path}: {size:,} bytes is not a whole number of uint16 ids", BAD_DATA)
    lengths, digest = Tokenizer().token_bytes, hashlib.sha256()
    documents = text_bytes = 0
    wide = size - start > 2
    with path.open("rb") as file:
        digest.update(file.read(start))
        while block := file.read(_BLOCK):
            digest.update(block)
            ids: NDArray[Any] = np.frombuffer(block, "<u2")
            if int(ids.max()) >= VOCAB:
                text = f"{path}: id {int(ids.max())} is outside GPT-2's vocabulary of {VOCAB:,}"
                raise SotaError(text, BAD_DATA)
            wide = wide and not ids[1::2].any()
            documents += int((ids == EOT).sum())
            text_bytes += int(lengths[ids].sum())
    if wide:
        raise SotaError(f"{path}: every other id is 0: these are 32-bit ids, not uint16", BAD_DATA)
    tokens = (size - start) // 2
    counts = {"tokens": tokens, "documents": documents, "text_bytes": text_bytes}
    return counts, digest.hexdigest()


def _check_index(path: Path, tokens: int) -> None:
    """SotaError 65 if the index next to a file contradicts it."""
    index = path.with_suffix(".idx")
    if path.suffix == ".bin" and index.exists():
        data = index.read_bytes()
        if not data.startswith(_MEGATRON_MAGIC) or len(data) < 34:
            raise SotaError(f"{index}: not a Megatron index", BAD_DATA)
        if (code := data[_MEGATRON_COUNT - 1]) != _MEGATRON_UINT16:
            text = f"{index}: ids of Megatron's type {code}; expected {_MEGATRON_UINT16}, uint16"
            raise SotaError(text, BAD_DATA)
        (sequences,) = struct.unpack_from("<Q", data, _MEGATRON_COUNT)
        if len(data) < 34 + 4 * sequences:
            raise SotaError(f"{index}: truncated or damaged", BAD_DATA)
        lengths = np.frombuffer(data, "<i4", sequences, 34)
        if int(lengths.sum()) != tokens:
            raise SotaError(f"{index} and {path.name} disagree on the number of ids", BAD_DATA)
    index = path.with_name(f"{path.name}.index")
    end = tokens.to_bytes(8, "little")  # where the last document ends
    if path.suffix == ".ds" and index.exists() and index.read_bytes()[-8:] != end:
        raise SotaError(f"{index} and {path.name} disagree on the number of ids", BAD_DATA)
