"""The prepared data on disk, and token windows read from it.

    train-00000.npy         uint16 ids, each document closed by end-of-text
    train-00000.ends.npy    uint64, where each document of that shard ends, in tokens
    train-00000.hashes.npy  uint64 (documents, 2), the keyed hash of each document's text
    val-00000.npy ...       the same for validation; no document spans two shards
    manifest.json           last: sizes and SHA-256, counts, tokenizer, sources; present = complete

`TokenWindows` uses plain reads, not a memory map: if a shard is truncated under a running process,
a read fails with an error that names it, where a map would kill the process with SIGBUS.
"""

import json
import os
import resource
import stat
from bisect import bisect_right
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from sota_transformer.config import VOCAB
from sota_transformer.data.foreign import ENDINGS, foreign_files, foreign_manifest
from sota_transformer.durable import (
    MANIFEST,
    canonical_json,
    read_manifest,
    seal,
    sha256_file,
    write_file,
)
from sota_transformer.errors import BAD_DATA, NO_INPUT, SotaError
from sota_transformer.shapes import misfit
from sota_transformer.words import counted, in_shell

FORMAT = "sota-shards-1"
SPLITS = ("train", "val")
HEADER_BYTES = 128
_SIDECARS = ("ends", "hashes")
_OTHER_FILES = 256  # open files allowed for besides the shards
_FOREIGN = ".foreign.json"
_VERIFIED = ".verified.json"  # files already verified, with size, mtime and inode at that time

_SIDE = {"shards": [str], "tokens": int, "documents": int, "text_bytes": int}
_INPUT = {"input": str, "files": int, "documents": int, "text_bytes": int, "tokens": int}
_SHAPE = {  # the parts of a manifest that are read
    "files": {str: {"bytes": int, "sha256": str, "start?": int}},
    "splits": dict.fromkeys(SPLITS, _SIDE),
    "fingerprint": str,
    "inputs": [_INPUT],
    "rejects": {str: {"count": int, "examples": [str]}},
    "requests": [str],
}
_APPENDED = {  # the parts that only an append reads
    "options": {"exclude": [str], "near_dedup": float},
    "split_rule": {"hash": str, "val_below": int},
}

Split = Literal["train", "val"]


def check_folder(folder: Path) -> None:
    """SotaError 66 if `folder` is not an existing folder."""
    if folder.is_file():
        inside = folder.suffix in ENDINGS or (folder.parent / MANIFEST).exists()
        advice = f"use its folder, {folder.parent}" if inside else _prepare_first(folder)
        raise SotaError(f"{folder} is a file, not prepared data; {advice}", NO_INPUT)
    if folder.is_symlink() and not folder.is_dir():
        text = f"{folder} is a link to {folder.readlink()}, which is no folder; check the link"
        raise SotaError(text, NO_INPUT)
    if not folder.is_dir():
        here = ";" if folder.is_absolute() else f" in {Path.cwd()}; change directory, or"
        raise SotaError(
            f"{folder}: no such folder{here} create it with "
            f"`sota prepare INPUT... --out {in_shell(folder)}`",
            NO_INPUT,
        )


def _prepare_first(texts: Path) -> str:
    """Advice when raw text is given where prepared data is needed."""
    data = f"data/{texts.absolute().stem}"
    return f"first run `sota prepare {in_shell(texts)} --out {in_shell(data)}`, then use {data}"


def _unfit(folder: Path, what: str, advice: str = "") -> SotaError:
    """SotaError 65 for data that `sota prepare` did not write like this, with advice."""
    again = f"`sota prepare INPUT --out {in_shell(folder)}`"  # it never overwrites a folder
    advice = advice or f"move {in_shell(folder)} away and recreate it with {again}"
    return SotaError(f"{what}; {advice}", BAD_DATA)


def load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    SotaError 66 if the folder is missing; 65 if it is incomplete, was changed, or has another
    format or vocabulary.
    """
    check_folder(folder)
    if not (folder / MANIFEST).exists():
        if foreign_files(folder):
            return _foreign(folder)
        text = any(folder.iterdir()) and not (folder / "train-00000.npy").exists()
        advice = _prepare_first(folder) if text else ""
        if (folder / "config.json").exists():  # a run or a model, which is not text
            advice = "give a folder created by `sota prepare`"
        raise _unfit(folder, f"{folder} has no {MANIFEST}, so it is not prepared data", advice)
    try:
        manifest = read_manifest(folder / MANIFEST)
    except SotaError as error:
        raise _unfit(folder, str(error)) from error
    if (found := manifest.get("format")) != FORMAT:  # perhaps a checkpoint: do not say to move it
        advice = "give a folder created by `sota prepare`"
        raise _unfit(folder, f"{folder} has format {found!r}, not {FORMAT!r}", advice)
    if (found := manifest.get("vocab_size")) != VOCAB:
        raise _unfit(folder, f"{folder} has a vocabulary of {found}, not {VOCAB}")
    if wrong := misfit(manifest, _SHAPE | _APPENDED, MANIFEST):
        raise _unfit(folder, f"{folder}: {wrong}")
    for split in SPLITS:
        shards = manifest["splits"][split]["shards"]
        names = [f"{split}-{i:05d}.npy" for i in range(len(shards))]
        sidecars = {sidecar(name, kind) for name in names for kind in _SIDECARS}
        if shards != names or not manifest["files"].keys() >= {*names, *sidecars}:
            wrong = f"{MANIFEST} lacks files of its {counted(len(names), f'{split} shard')}"
            raise _unfit(folder, f"{folder}: {wrong}")
    return manifest


def _foreign(folder: Path) -> dict[str, Any]:
    """The manifest of another project's files, cached until they or their indexes change."""
    beside = sorted(path for path in folder.glob("*.i*x") if path.is_file())  # .idx, .index
    found = ((path.name, path.stat()) for path in (*foreign_files(folder), *beside))
    mark = [[name, status.st_size, status.st_mtime_ns] for name, status in found]
    note = folder / _FOREIGN
    try:
        known = read_manifest(note)
    except SotaError:
        known = {}
    if known.get("mark") == mark and not misfit(known, _SHAPE):
        return known
    manifest = foreign_manifest(folder) | {"mark": mark}
    with suppress(OSError):  # without a cache, a read-only folder is read in full every time
        write_file(note, canonical_json(seal(manifest)))
    return manifest


def sidecar(shard: str, kind: str) -> str:
    """Name of the file that holds the `ends` or the `hashes` of a shard's documents."""
    return shard.removesuffix(".npy") + f".{kind}.npy"


class Shard:
    """One `.npy` file of a prepared folder, open for reading and checked against the manifest."""

    def __init__(self, folder: Path, name: str, manifest: dict[str, Any]) -> None:
        """Open and check. SotaError 65 for a wrong size, type or hash."""
        self.path, entry = folder / name, manifest["files"][name]
        advice = "it must be a regular file" if "start" in entry else ""  # a foreign file
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            self._file = os.fdopen(os.open(self.path, flags), "rb", buffering=0)
            found = os.fstat(self._file.fileno())
        except OSError as error:
            raise _unfit(folder, f"{self.path}: {error.strerror}", advice) from error
        if not stat.S_ISREG(found.st_mode) or found.st_size != entry["bytes"]:
            what = f"{self.path} has {found.st_size:,} bytes, not {entry['bytes']:,}"
            raise _unfit(folder, what, advice)
        _verify_once(self.path, found, entry["sha256"])
        self._start = entry.get("start", HEADER_BYTES)
        self.items = (found.st_size - self._start) // 2
        if "start" not in entry:  # foreign files have no header of ours
            _check_header(self._file, self.path, found.st_size)

    def read(self, start: int, stop: int) -> NDArray[np.uint16]:
        """Ids start..stop: (stop - start,). SotaError 65 if the file was truncated."""
        at, want, data = self._start + 2 * start, 2 * (stop - start), b""
        while len(data) < want:  # a read may stop at 2 GB, or at the end of a truncated file
            more = os.pread(self._file.fileno(), want - len(data), at + len(data))
            if not more:
                raise SotaError(f"{self.path} was truncated while in use", BAD_DATA)
            data += more
        return np.frombuffer(data, "<u2")


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The header of all our `.npy` files, HEADER_BYTES long."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape})
    room = HEADER_BYTES - npy.MAGIC_LEN - 2
    head = npy.magic(1, 0) + room.to_bytes(2, "little")
    return head + text.encode().ljust(room - 1) + b"\n"


def _check_header(file: IO[bytes], path: Path, size: int) -> None:
    """SotaError 65 unless a file of `size` bytes has the header that we write for that size."""
    wide = {".hashes": ("<u8", (2,)), ".ends": ("<u8", ())}
    dtype, columns = wide.get(Path(path.stem).suffix, ("<u2", ()))
    row = np.dtype((dtype, columns)).itemsize
    rows, rest = divmod(size - HEADER_BYTES, row)
    if rest or file.read(HEADER_BYTES) != npy_header(dtype, (rows, *columns)):
        raise _unfit(path.parent, f"{path}: not a .npy file as `sota prepare` writes it")


def load_array(folder: Path, name: str, manifest: dict[str, Any]) -> NDArray[Any]:
    """The array in a file of prepared data. SotaError 65 if damaged, OSError if missing."""
    path = folder / name
    _verify_once(path, path.stat(), manifest["files"][name]["sha256"])
    with path.open("rb") as file:
        _check_header(file, path, path.stat().st_size)
    return np.load(path, allow_pickle=False)


def _verify_once(path: Path, found: os.stat_result, sha256: str) -> None:
    """Hash the file unless the same file was verified before. SotaError 65 on a mismatch."""
    note, mark = path.parent / _VERIFIED, [found.st_size, found.st_mtime_ns, found.st_ino, sha256]
    try:
        known = json.loads(note.read_bytes())
    except (OSError, ValueError, RecursionError):
        known = {}
    known = known if isinstance(known, dict) else {}
    if known.get(path.name) == mark:
        return
    if sha256_file(path) != sha256:
        raise _unfit(path.parent, f"{path}: sha256 mismatch, the file is damaged")
    with suppress(OSError):  # a read-only data folder is hashed on every start
        write_file(note, json.dumps(known | {path.name: mark}).encode())


def _allow_files(count: int) -> None:
    """Raise the limit on open files to `count`, as far as allowed: macOS starts at 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = count if hard < 0 else min(count, hard)  # negative means unlimited
    if 0 <= soft < count:
        with suppress(OSError, ValueError):  # opening the files will report it
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


class TokenWindows:
    """A split as windows of seq_len + 1 tokens; consecutive windows overlap by one token.

    The documents form one stream; only a remainder shorter than a window is dropped.
    """

    padding = 0.0

    def __init__(self, folder: Path, split: Split, seq_len: int) -> None:
        """Open and check. SotaError 66 if the folder is missing, 65 if damaged or too short."""
        manifest = load_manifest(folder)
        part = manifest["splits"][split]
        self.seq_len, self.tokens, self.text_bytes = seq_len, part["tokens"], part["text_bytes"]
        self.documents, self.fingerprint = part["documents"], manifest["fingerprint"]
        shards = (name for each in SPLITS for name in manifest["splits"][each]["shards"])
        self.files = {name: manifest["files"][name]["sha256"] for name in shards}
        if self.tokens < seq_len + 1:
            larger = "prepare again with a larger --val-fraction, " * (split == "val")
            advice = f"prepare more text, {larger}"
            if "mark" in manifest:  # of another project
                advice = f"add a file of more tokens named like {split}.bin, "
            raise SotaError(
                f"{folder}: the {split} split has {counted(self.tokens, 'token')}, but a "
                f"window needs {seq_len + 1:,}; {advice}or shorten it (of a run: --model.seq-len)",
                BAD_DATA,
            )
        _allow_files(_OTHER_FILES + 2 * len(self.files))  # including the other split's
        self._shards = [Shard(folder, name, manifest) for name in part["shards"]]
        self._starts = [0, *accumulate(shard.items for shard in self._shards)]
        if self._starts[-1] != self.tokens:
            found = f"{self._starts[-1]:,} tokens, but the manifest says {self.tokens:,}"
            raise SotaError(f"{folder}: the {split} shards hold {found}", BAD_DATA)

    def __len__(self) -> int:
        return (self.tokens - 1) // self.seq_len

    def __getitem__(self, index: int) -> NDArray[np.uint16]:
        """Window `index`: (seq_len + 1,) uint16."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.seq_len
        return self.read(start, start + self.seq_len + 1)

    def read(self, start: int, stop: int) -> NDArray[np.uint16]:
        """Tokens start..stop of the whole split, across shards: (stop - start,) uint16."""
        pieces, at = [], bisect_right(self._starts, start) - 1
        while start < stop:
            base, end = self._starts[at], min(stop, self._starts[at + 1])
            pieces.append(self._shards[at].read(start - base, end - base))
            start, at = end, at + 1
        ids = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        if ids.max(initial=0) >= VOCAB:
            text = f"{self._shards[0].path.parent}: id {ids.max()} is outside the vocabulary"
            raise SotaError(f"{text} of {VOCAB:,}", BAD_DATA)
        return ids


def check_windows(folder: Path, seq_len: int) -> None:
    """SotaError, as of TokenWindows, for data that training would refuse."""
    for split in SPLITS:
        TokenWindows(folder, split, seq_len)
