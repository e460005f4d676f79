"""Viewing prepared data, other projects' token files, and the other ways to cut windows."""

import hashlib
import itertools
import json
import os
import re
import resource
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from sota_transformer.data import view as view_module
from sota_transformer.data.packing import BestFit, _best_fit, document_ids
from sota_transformer.data.shards import TokenWindows, load_manifest
from sota_transformer.data.tokenizer import EOT, Tokenizer
from sota_transformer.data.view import describe
from sota_transformer.errors import LOCKED, SotaError
from sota_transformer.options import DataView
from tests.preparing import documents, jsonl, run, stream, texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("view")
    (root / "a.jsonl").write_bytes(jsonl(texts(400)) + b"not json\n")
    run(root / "data", root / "a.jsonl")
    return root / "data"


def test_figures_are_those_of_the_documents(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = describe(DataView(folder=folder, show=1))
    out = capsys.readouterr().out
    train = documents(folder, "train")
    tokenizer = Tokenizer()
    lengths = [len(tokenizer.encode(text)) for text in train[:20]]
    assert figures["train"]["documents"] == len(train)
    assert figures["train"]["text_bytes"] == sum(len(text.encode()) for text in train)
    assert sum(count for _, count in figures["train"]["length_histogram"]) == len(train)
    assert figures["train"]["length_quantiles"][0] <= min(lengths)
    assert figures["train"]["length_quantiles"][-1] >= max(lengths)
    assert set(figures["train"]["scripts"]) == {"Latin", "CJK"}
    assert "not a JSON line" in out and "--- train document" in out


def test_letters_are_letters(tmp_path: Path) -> None:
    """Quotes, brackets and dashes belong to no script, and Vietnamese is written in Latin."""
    items = [f"\u201c{i}\u201d [\u2018Tất cả mọi người\u2019] {{_{i}_}} ж\u2026" for i in range(60)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(items))
    run(tmp_path / "data", tmp_path / "a.jsonl")
    scripts = describe(DataView(folder=tmp_path / "data", show=0))["train"]["scripts"]
    assert scripts == {"Latin": 13 / 14, "Cyrillic": 1 / 14}


def test_a_foreign_file_of_one_long_document_has_a_length(tmp_path: Path) -> None:
    np.ones((1 << 25) + 3, "<u2").tofile(tmp_path / "train.bin")
    figures = describe(DataView(folder=tmp_path, show=0))["train"]
    assert figures["length_histogram"] == [[1 << 25, 1]]


@pytest.mark.parametrize("ids", [[1, 2, 3, EOT, 4, 5], [EOT, 1, 2, 3, EOT, 4, 5]])
def test_documents_of_others_need_no_end(tmp_path: Path, ids: list[int]) -> None:
    """The last document of nanoGPT's Shakespeare has no end; llm.c's precedes each document."""
    np.array(ids, "<u2").tofile(tmp_path / "train.bin")
    figures = describe(DataView(folder=tmp_path, show=0))["train"]
    assert (figures["documents"], figures["bytes_per_token"]) == (2, 1.0)
    assert figures["length_quantiles"][::4] == [2, 3]


def test_list_and_window_and_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    describe(DataView(folder=folder, list_split="val"))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == len(documents(folder, "val")) == len({row["hash"] for row in rows})
    lengths = [row["tokens"] for row in rows]
    figures = describe(DataView(folder=folder, show=0))["val"]
    assert [min(lengths), max(lengths)] == figures["length_quantiles"][::4]
    assert sum(lengths) + len(rows) == figures["tokens"]
    told = capsys.readouterr().out.split("val: ")[1]
    bars = re.findall(r"^ +([0-9]+)\+ +([0-9]+) #", told, re.M)
    filled = [[str(edge), str(count)] for edge, count in figures["length_histogram"] if count]
    assert list(map(list, bars)) == filled
    describe(DataView(folder=folder, window="train:1:50"))
    window = TokenWindows(folder, "train", 50)[1]
    shown = capsys.readouterr().out.replace("\n--- end of text ---\n", "")
    assert shown.strip() == Tokenizer().decode(window).strip()
    page = folder.parent / "page.html"
    describe(DataView(folder=folder, html=page, leakage=True))
    text = page.read_text()
    assert 'class="bar" style="width:30.00rem"' in text
    assert "not a JSON line" in text and "13-grams" in text
    assert "http" not in text and "<script" not in text
    for wrong in ("test:1", "train", "train:x", "train:99999999", "train:0:0"):
        with pytest.raises(SotaError):
            describe(DataView(folder=folder, window=wrong))


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems refuse such names")
def test_a_page_with_names_that_are_not_text(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl(texts(50)))
    (folder / os.fsdecode(b"\xfe.bin")).write_bytes(b"no text")
    run(folder / "data", folder)
    describe(DataView(folder=folder / "data", html=folder / "page.html"))
    assert "?.bin" in (folder / "page.html").read_text("utf-8")


def test_control_characters_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([f"{t}\x1b[31m\x07\x9b red" for t in texts(50)]))
    run(tmp_path / "data", tmp_path / "a.jsonl")
    for how in ({"show": 3}, {"window": "train:0:200"}):
        describe(DataView(folder=tmp_path / "data", **how))
        out = capsys.readouterr().out
        assert not re.search("[\x1b\x07\x9b]", out) and ".\n?[31m?? red\n" in out


def test_leakage_as_by_brute_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    pool = [" ".join(f"w{n}" for n in random.integers(0, 900, 60)) for _ in range(300)]
    items = [f"{a} {b}" for a, b in itertools.pairwise(pool)]  # neighbors share text
    (tmp_path / "a.jsonl").write_bytes(jsonl(items))
    run(tmp_path / "data", tmp_path / "a.jsonl")
    sets, tokenizer = {}, Tokenizer()
    for split in ("train", "val"):
        sets[split] = set()
        for text in documents(tmp_path / "data", split):
            ids = tokenizer.encode(text)
            sets[split] |= {tuple(ids[i : i + 13]) for i in range(len(ids) - 12)}
    share = len(sets["val"] & sets["train"]) / len(sets["val"])
    assert 0.3 < share < 1
    view = DataView(folder=tmp_path / "data", leakage=True)
    for block in (1 << 20, 1000):
        monkeypatch.setattr("sota_transformer.data.view._BLOCK", block)
        assert describe(view)["leakage"] == pytest.approx(share, abs=1e-9)
    sizes, plain = list[int](), view_module.GramSet
    monkeypatch.setattr(view_module, "GramSet", lambda x: sizes.append(len(x)) or plain(x))
    monkeypatch.setattr(view_module, "_MOST_GRAMS", 1000)
    assert describe(view)["leakage"] == pytest.approx(share, abs=0.1), "of a sample"
    assert 500 < sizes[0] < 1100, "as many as are wanted"


def megatron_index(ids: np.ndarray) -> bytes:
    ends = np.flatnonzero(ids == EOT) + 1
    lengths = np.diff(ends, prepend=0).astype(np.int32)
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1)
    pointers = ((ends - lengths) * 2).astype(np.int64)
    return head + lengths.tobytes() + pointers.tobytes() + np.arange(len(ends) + 1).tobytes()


def write_foreign(folder: Path, kind: str, parts: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    for split, ids in parts.items():
        if kind == "llmc":
            head = np.zeros(256, np.int32)
            head[:3] = 20240520, 1, len(ids)
            (folder / f"x_{split}_000001.bin").write_bytes(head.tobytes() + ids.tobytes())
        elif kind == "datatrove":
            (folder / f"000_{split}.ds").write_bytes(ids.tobytes())
            ends = (np.flatnonzero(ids == EOT) + 1).astype(np.uint64)
            (folder / f"000_{split}.ds.index").write_bytes(ends.tobytes())
        else:
            (folder / f"{split}.bin").write_bytes(ids.tobytes())
            if kind == "megatron":
                (folder / f"{split}.idx").write_bytes(megatron_index(ids))


@pytest.mark.parametrize("kind", ["nanogpt", "llmc", "megatron", "datatrove"])
def test_other_projects_files_open_as_they_are(folder: Path, tmp_path: Path, kind: str) -> None:
    parts = {split: stream(folder, split) for split in ("train", "val")}
    write_foreign(tmp_path / kind, kind, parts)
    for split, ids in parts.items():
        ours, theirs = (TokenWindows(f, split, 64) for f in (folder, tmp_path / kind))
        for name, entry in load_manifest(tmp_path / kind)["files"].items():
            data = (tmp_path / kind / name).read_bytes()
            assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert (theirs.tokens, theirs.documents) == (ours.tokens, ours.documents)
        assert theirs.text_bytes == ours.text_bytes
        assert np.array_equal(theirs[3], ids[192 : 192 + 65])
    assert theirs.fingerprint == TokenWindows(tmp_path / kind, "val", 32).fingerprint
    assert describe(DataView(folder=tmp_path / kind, show=0))["val"]["documents"] > 0


def test_the_split_of_a_foreign_file_is_a_word_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = {
        "train": ["medieval.bin", "train_retrieval_000001.bin", "values.bin"],
        "val": ["fineweb_val_000000.bin", "my-Validation.bin", "val2.bin", "valid.bin"],
    }
    for name in itertools.chain(*sides.values(), ["._values.bin"]):
        np.arange(9, dtype=np.uint16).tofile(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.bin")  # without a writer: opening it would block forever
    found = load_manifest(tmp_path)["splits"]
    assert {side: sorted(found[side]["shards"]) for side in sides} == {
        side: sorted(names) for side, names in sides.items()
    }
    listing = Path.iterdir  # its order is that of the disk
    for order in (1, -1):
        monkeypatch.setattr(Path, "iterdir", lambda path, step=order: list(listing(path))[::step])
        assert load_manifest(tmp_path)["splits"] == found


def test_bad_foreign_files_are_refused(folder: Path, tmp_path: Path) -> None:
    ids = stream(folder, "train")
    for name, data in {
        "odd": ids.tobytes()[:-1],
        "vocabulary": np.append(ids, 50258).astype(np.uint16).tobytes(),
        "wide": ids.astype(np.uint32).tobytes(),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.bin").write_bytes(data)
        with pytest.raises(SotaError) as caught:
            TokenWindows(tmp_path / name, "train", 8)
        assert caught.value.code == 65
    write_foreign(tmp_path / "index", "megatron", {"train": ids})
    for other in (ids[:-2], np.append(ids, ids[:2])):
        (tmp_path / "index" / "train.bin").write_bytes(other.tobytes())
        with pytest.raises(SotaError, match="disagree"):
            TokenWindows(tmp_path / "index", "train", 8)
    write_foreign(tmp_path / "llmc", "llmc", {"train": ids})
    path = tmp_path / "llmc" / "x_train_000001.bin"
    for head in ((20240801, 7, len(ids)), (20240520, 1, len(ids) - 1), (20240520, 2, len(ids))):
        path.write_bytes(np.array(head, "<i4").tobytes() + path.read_bytes()[12:])
        with pytest.raises(SotaError, match=f"version {head[1]} whose header says {head[2]:,} ids"):
            TokenWindows(tmp_path / "llmc", "train", 8)
    for kind, name in (("megatron", "train.idx"), ("datatrove", "000_train.ds.index")):
        write_foreign(tmp_path / kind, kind, {"train": ids})
        whole = (tmp_path / kind / name).read_bytes()
        cuts = (whole[:cut] for cut in (40, 20, 10, 3, 0))
        for data in (*cuts, whole[:18] + b"\xff" * 8):
            (tmp_path / kind / name).write_bytes(data)
            with pytest.raises(SotaError) as caught:
                TokenWindows(tmp_path / kind, "train", 8)
            assert caught.value.code == 65 and name in str(caught.value)
    write_foreign(tmp_path / "signed", "megatron", {"train": ids})
    index = (tmp_path / "signed" / "train.idx").read_bytes()
    assert TokenWindows(tmp_path / "signed", "train", 8).tokens == len(ids)  # then from the cache
    (tmp_path / "signed" / "train.idx").write_bytes(index[:17] + b"\3" + index[18:])
    with pytest.raises(SotaError, match=r"train\.idx: ids of Megatron's type 3; expected 8"):
        TokenWindows(tmp_path / "signed", "train", 8)
    write_foreign(tmp_path / "changed", "nanogpt", {"train": ids})
    with pytest.raises(SotaError, match=r"0 tokens.*add a file of more tokens"):
        TokenWindows(tmp_path / "changed", "val", 8)
    before = TokenWindows(tmp_path / "changed", "train", 8).fingerprint
    (tmp_path / "changed" / "train.bin").write_bytes(ids[::-1].tobytes())
    assert TokenWindows(tmp_path / "changed", "train", 8).fingerprint != before


def test_a_name_that_only_contains_val_is_training(folder: Path, tmp_path: Path) -> None:
    ids = stream(folder, "train")
    for name in ("medieval.bin", "interval_text_document.bin"):
        (tmp_path / name).write_bytes(ids.tobytes())
    for name in ("x_val_000001.bin", "Validation.bin", "valid.bin", "val00.bin"):
        (tmp_path / name).write_bytes(ids[:400].tobytes())
    assert TokenWindows(tmp_path, "train", 8).tokens == 2 * len(ids)
    assert TokenWindows(tmp_path, "val", 8).tokens == 4 * 400


def test_more_files_than_a_process_may_open_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default limit is 256 on macOS, and llm.c's larger sets have a thousand files."""
    for i in range(30):
        np.array([1, 2, EOT], np.uint16).tofile(tmp_path / f"{i}.bin")
    before, open_ = resource.getrlimit(resource.RLIMIT_NOFILE), len(list(Path("/dev/fd").iterdir()))
    finite = 0 < before[1] < 1 << 31  # otherwise macOS refuses its own limit
    for others in (256, before[1] if finite else 256):  # the second exceeds the limit
        monkeypatch.setattr("sota_transformer.data.shards._OTHER_FILES", others)
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_ + 9, before[1]))
        try:
            assert TokenWindows(tmp_path, "train", 8).tokens == 90
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_export_and_back(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sota_transformer.data.view._BLOCK", 1000)  # at a time
    out = tmp_path / "new" / "out"
    describe(DataView(folder=folder, export_bin=out))
    for split in ("train", "val"):
        ids = np.fromfile(out / f"{split}.bin", np.uint16)
        assert np.array_equal(ids, stream(folder, split))
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts(9)))
    run(tmp_path / "data", tmp_path / "a.jsonl", val_fraction=0.0)
    describe(DataView(folder=tmp_path / "data", export_bin=out))
    assert not (out / "val.bin").exists()  # from the previous export
    (tmp_path / "failed" / "train.bin").mkdir(parents=True)
    with pytest.raises(SotaError, match=r"train\.bin: "):
        describe(DataView(folder=tmp_path / "data", export_bin=tmp_path / "failed"))
    assert len(list((tmp_path / "failed").iterdir())) == 1, "nothing half written stays"
    with pytest.raises(SotaError, match=r"cannot create .*a\.jsonl: File exists") as refused:
        describe(DataView(folder=tmp_path / "data", export_bin=tmp_path / "a.jsonl"))
    assert refused.value.code == LOCKED


def test_an_export_that_is_interrupted_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        describe(DataView(folder=folder, export_bin=tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def test_document_ids() -> None:
    ids = np.array([[5, EOT, 6, 7, EOT, 8], [EOT, EOT, 1, 2, 3, EOT]])
    assert document_ids(ids).tolist() == [[0, 0, 1, 1, 1, 2], [0, 1, 2, 2, 2, 2]]


@pytest.mark.parametrize("seq_len", [15, 63, 200])
def test_best_fit_loses_no_pair_and_starts_at_documents(folder: Path, seq_len: int) -> None:
    """Every (token, next token) pair within a document is in exactly one window."""
    windows = BestFit(folder, "train", seq_len)
    ids, pad = stream(folder, "train"), Tokenizer.pad
    ends = np.flatnonzero(ids == EOT) + 1
    starts = {tuple(ids[a : a + 12]) for a in [0, *ends[:-1].tolist()]}
    found, firsts, targets = [], 0, 0
    for i in range(len(windows)):
        window = windows[i]
        assert window.shape == (seq_len + 1,)
        real = window[window != pad]
        assert len(real) and (window[len(real) :] == pad).all()
        firsts += tuple(real[:12]) in starts
        found.append(real)
        targets += len(real) - 1
    pairs = [np.stack([x[:-1], x[1:]], 1) for x in [ids, *found]]
    expected, *got = (pair[pair[:, 0] != EOT] for pair in pairs)
    order = np.lexsort(expected.T), np.lexsort(np.concatenate(got).T)
    assert np.array_equal(expected[order[0]], np.concatenate(got)[order[1]])
    assert windows.padding == pytest.approx(1 - targets / (len(windows) * seq_len))
    if seq_len == 200:
        assert firsts == len(windows), "every document fits, so every window starts with one"
        assert windows.padding < 0.03
    for i in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[i]


def test_best_fit_has_no_window_without_a_target(tmp_path: Path) -> None:
    """Other projects' files may repeat end-of-text; a batch of only those has no loss."""
    write_foreign(tmp_path / "x", "nanogpt", {"train": np.array([EOT, 1, 2, 3, EOT, EOT], "<u2")})
    windows = BestFit(tmp_path / "x", "train", 3)
    assert [windows[i].tolist() for i in range(len(windows))] == [[1, 2, 3, EOT]]
    assert windows.padding == 0


def test_nothing_follows_a_truncated_document(tmp_path: Path) -> None:
    """Other projects' files may stop inside a document, which would then run into the next."""
    ids = np.array([9, 9, EOT, 8, EOT, 1, 2, 3, 4], "<u2")
    write_foreign(tmp_path / "x", "nanogpt", {"train": ids})
    windows = BestFit(tmp_path / "x", "train", 9)
    assert windows[0].tolist() == [9, 9, EOT, 8, EOT, 1, 2, 3, 4, Tokenizer.pad]
    write_foreign(tmp_path / "y", "nanogpt", {"train": ids[1:]})  # several windows, one incomplete
    windows = BestFit(tmp_path / "y", "train", 6)
    assert [windows[i].tolist() for i in range(len(windows))] == [
        [9, EOT, 1, 2, 3, 4, Tokenizer.pad],
        [8, EOT, *[Tokenizer.pad] * 5],
    ]


def test_best_fit_packs_like_the_slow_algorithm() -> None:
    random = np.random.default_rng(2)
    lengths, size = random.integers(1, 65, 500), 64
    order, offsets = _best_fit(lengths, size)
    assert sorted(order.tolist()) == list(range(500))
    rooms: list[int] = []
    for piece in np.argsort(-lengths, kind="stable"):
        fits = [(room, at) for at, room in enumerate(rooms) if room >= lengths[piece]]
        at = min(fits)[1] if fits else len(rooms)
        if not fits:
            rooms.append(size)
        rooms[at] -= int(lengths[piece])
    sums = [lengths[order[a:b]].sum() for a, b in itertools.pairwise(offsets)]
    assert max(sums) <= size
    assert sorted(size - s for s in sums) == sorted(rooms)
