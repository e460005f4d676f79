"""Windows over shards against plain slices; anything damaged is refused by name."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from sota_transformer.data import commit, merge, shards
from sota_transformer.data.shards import TokenWindows, load_manifest
from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.durable import canonical_json, read_manifest, seal, verify
from sota_transformer.errors import SotaError
from tests.preparing import jsonl, run, stream

TEXTS = [f"Document {i}: " + "the quick brown fox jumps. " * (i % 9 + 1) for i in range(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with shards of 1,000 tokens, so that windows span several."""
    root = tmp_path_factory.mktemp("shards")
    (root / "in.jsonl").write_bytes(jsonl(TEXTS))
    small, merge.SHARD_TOKENS = merge.SHARD_TOKENS, 1000
    try:
        run(root / "data", root / "in.jsonl")
    finally:
        merge.SHARD_TOKENS = small
    return root / "data"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A prepared folder to damage."""
    target = tmp_path / "data"
    target.mkdir()
    for path in folder.glob("[!.]*"):
        (target / path.name).write_bytes(path.read_bytes())
    return target


def rewrite(folder: Path, **changes: object) -> None:
    """Change the manifest and reseal it."""
    manifest = read_manifest(folder / "manifest.json") | changes
    (folder / "manifest.json").write_bytes(canonical_json(seal(manifest)))


def test_files_are_real_npy_and_the_manifest_lists_them_all(folder: Path) -> None:
    manifest = load_manifest(folder)
    assert verify(folder) == []
    listed = {*manifest["files"], "manifest.json"}
    assert {path.name for path in folder.glob("[!.]*")} == listed
    for split in ("train", "val"):
        part = manifest["splits"][split]
        tokens = documents = 0
        for name in part["shards"]:
            ids = np.load(folder / name, mmap_mode="r", allow_pickle=False)
            ends = np.load(folder / name.replace(".npy", ".ends.npy"))
            hashes = np.load(folder / name.replace(".npy", ".hashes.npy"))
            assert ids.dtype == np.uint16 and ends.dtype == np.uint64
            assert ends[-1] == len(ids) and hashes.shape == (len(ends), 2)
            assert np.array_equal(np.flatnonzero(ids == EOT) + 1, ends)
            tokens, documents = tokens + len(ids), documents + len(ends)
        assert (tokens, documents) == (part["tokens"], part["documents"])
    assert len(manifest["splits"]["train"]["shards"]) > 3


def test_the_documents_are_all_there_and_decode(folder: Path) -> None:
    tokenizer, found = Tokenizer(), []
    for split in ("train", "val"):
        ids = stream(folder, split)
        starts = [0, *(np.flatnonzero(ids == EOT) + 1).tolist()]
        found += [tokenizer.decode(ids[a : b - 1]) for a, b in itertools.pairwise(starts)]
    assert sorted(found) == sorted(TEXTS)
    sizes = load_manifest(folder)["splits"]
    assert sum(part["text_bytes"] for part in sizes.values()) == sum(map(len, TEXTS))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("seq_len", [8, 31, 64, 1500])
def test_windows_are_slices_of_the_stream(folder: Path, split: shards.Split, seq_len: int) -> None:
    ids = stream(folder, split)
    if len(ids) <= seq_len:
        pytest.skip("shorter than a window")
    windows = TokenWindows(folder, split, seq_len)
    assert len(windows) == (len(ids) - 1) // seq_len
    assert len(ids) - len(windows) * seq_len <= seq_len  # less than a window is dropped
    for i in range(len(windows)):
        assert np.array_equal(windows[i], ids[i * seq_len : i * seq_len + seq_len + 1])
    for i in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[i]
    assert windows.tokens == len(ids) and len(windows.fingerprint) == 64


def refused(folder: Path, code: int, *words: str, seq_len: int = 16) -> None:
    with pytest.raises(SotaError) as caught:
        TokenWindows(folder, "train", seq_len)
    assert caught.value.code == code
    assert all(word in str(caught.value) for word in words), caught.value


def test_missing_or_unfinished(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", 66, "sota prepare")
    refused(tmp_path, 65, "no manifest.json", "sota prepare")
    (tmp_path / "a.txt").write_text("Text that was given for data, not what is made of it.")
    refused(tmp_path, 65, f"first run `sota prepare {tmp_path} --out data/{tmp_path.stem}`, then")


def test_too_short_says_how_many_tokens(folder: Path) -> None:
    tokens = load_manifest(folder)["splits"]["train"]["tokens"]
    refused(folder, 65, f"{tokens:,} tokens", f"{tokens + 1:,}", seq_len=tokens)
    assert len(TokenWindows(folder, "train", tokens - 1)) == 1


def test_other_vocabulary_format_or_manifest(copy: Path) -> None:
    rewrite(copy, vocab_size=32000)
    refused(copy, 65, "32000", "50258")
    rewrite(copy, vocab_size=50258, format="other")
    refused(copy, 65, "format", "give a folder created by `sota prepare`")  # perhaps a checkpoint
    files = read_manifest(copy / "manifest.json")["files"]
    rewrite(copy, format=shards.FORMAT, files=files | {"train-00001.npy": {}})
    refused(copy, 65, "train-00001.npy")
    rewrite(copy, files={name: files[name] for name in files if name != "train-00001.npy"})
    refused(copy, 65, "lacks files of its")
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"tokens"', '"tokenz"', 1))
    refused(
        copy, 65, "hash", f"move {copy} away and recreate it with `sota prepare INPUT --out {copy}`"
    )


@pytest.mark.parametrize(
    "change", ["cut", "grown", "gone", "fifo", "link", "folder", "flipped", "other"]
)
def test_damaged_shards_are_refused_by_name(copy: Path, change: str) -> None:
    path = copy / "train-00001.npy"
    data = bytearray(path.read_bytes())
    path.unlink()
    if change == "fifo":
        os.mkfifo(path)
    elif change == "link":
        path.symlink_to("/dev/zero")
    elif change == "folder":
        path.mkdir()
    elif change == "other":  # as the manifest says, but not our file
        path.write_bytes(data.replace(b"<u2", b"<i2", 1))
        entry = {"bytes": len(data), "sha256": shards.sha256_file(path)}
        rewrite(copy, files=read_manifest(copy / "manifest.json")["files"] | {path.name: entry})
    elif change != "gone":
        data[len(data) // 2] ^= 1
        path.write_bytes({"cut": data[:-2], "grown": data + b"\0\0"}.get(change, bytes(data)))
    refused(copy, 65, path.name, f"move {copy} away")  # since `sota prepare` would not change it


def test_hashed_once_then_again_when_the_file_changed(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    real = shards.sha256_file
    monkeypatch.setattr(shards, "sha256_file", lambda path: hashed.append(path.name) or real(path))
    TokenWindows(copy, "train", 16)
    first = len(hashed)
    assert first == len(load_manifest(copy)["splits"]["train"]["shards"])
    TokenWindows(copy, "train", 16)
    assert len(hashed) == first
    path = copy / "train-00000.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(copy, 65, "sha256 mismatch", "train-00000.npy")


def test_a_shard_cut_while_in_use_is_an_error_not_a_crash(copy: Path) -> None:
    windows = TokenWindows(copy, "train", 16)
    for path in copy.glob("train-*.npy"):
        os.truncate(path, 200)
    with pytest.raises(SotaError) as caught:
        windows[len(windows) - 1]
    assert caught.value.code == 65 and "truncated" in str(caught.value)


def test_read_only_folder_is_fine(copy: Path) -> None:
    copy.chmod(0o555)
    try:
        assert len(TokenWindows(copy, "train", 16)) > 0
    finally:
        copy.chmod(0o755)


def test_what_a_manifest_lists_is_on_the_disk_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder before its name, the name itself, and what is appended before the new manifest."""
    kept: list[tuple[Path, list[str], int]] = []

    def fsync_folder(folder: Path) -> None:
        manifest = folder / "manifest.json"
        number = json.loads(manifest.read_bytes())["number"] if manifest.exists() else -1
        kept.append((folder, sorted(path.name for path in folder.iterdir()), number))

    monkeypatch.setattr(commit, "fsync_folder", fsync_folder)
    out, work = tmp_path / "out", tmp_path / "work"
    work.mkdir()
    (work / "a.npy").touch()
    commit.commit_new(work, out, {"number": 1})
    work.mkdir()
    (work / "b.npy").touch()
    commit.commit_append(work, out, {"number": 2})
    assert kept == [
        (work, ["a.npy", "manifest.json"], 1),
        (tmp_path, ["out"], -1),
        (out, ["a.npy", "b.npy", "manifest.json"], 1),
    ]
    assert json.loads((out / "manifest.json").read_bytes())["number"] == 2
