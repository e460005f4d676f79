"""`prepare` end to end: every document comes out once, in its split, whatever happens meanwhile."""

import bz2
import contextlib
import csv
import gzip
import io
import itertools
import lzma
import os
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import ipc, parquet

from sota_transformer.data import prepare as preparing
from sota_transformer.data import streams, tables, units
from sota_transformer.data.sources import find
from sota_transformer.data.tokenizer import EOT
from tests.preparing import bytes_of, documents, everything, jsonl, refused, run, texts

WITHOUT_GIGATOKEN = """
import sys
from pathlib import Path
from sota_transformer.data import units
from sota_transformer.data.tokenizer import Encoder
from tests.preparing import run
if __name__ == "__main__":
    assert Encoder().kind == "tiktoken"
    units.UNIT_BYTES = 8 << 10
    run(Path(sys.argv[1]), *sys.argv[2:])
"""


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of 8 kB, so that small inputs make many. Workers receive the cuts; they do not cut."""
    monkeypatch.setattr(units, "UNIT_BYTES", 8 << 10)


def test_what_goes_in_comes_out_once(tmp_path: Path) -> None:
    items = texts(300)
    (tmp_path / "a.jsonl").write_bytes(jsonl(items + items[:50]))
    manifest = run(tmp_path / "data", tmp_path / "a.jsonl")
    assert everything(tmp_path / "data") == sorted(items)
    assert manifest["rejects"]["exact duplicate"]["count"] == 50
    assert manifest["inputs"][0]["documents"] == 300
    assert not list(tmp_path.glob(".data*"))


def test_the_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    items = texts(400)
    (tmp_path / "a.jsonl").write_bytes(jsonl(items))
    (tmp_path / "b.jsonl").write_bytes(jsonl((items + texts(1000, seed=5))[::-1]))
    run(tmp_path / "one", tmp_path / "a.jsonl")
    run(tmp_path / "two", tmp_path / "b.jsonl")
    run(tmp_path / "more", tmp_path / "a.jsonl", val_fraction=0.3)
    old, new = (set(documents(tmp_path / name, "val")) for name in ("one", "two"))
    assert 15 < len(old) < 70
    assert old <= new and not old & set(documents(tmp_path / "two", "train"))
    assert old <= set(documents(tmp_path / "more", "val"))


def test_same_bytes_for_any_number_of_workers_and_either_encoder(
    tmp_path: Path, small_units: None
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts(400)))
    (tmp_path / "b.txt").write_text("\n\n".join(texts(400, seed=3)))
    inputs = (tmp_path / "a.jsonl", tmp_path / "b.txt")
    run(tmp_path / "one", *inputs)
    for workers in (2, 8):
        run(tmp_path / f"{workers}", *inputs, workers=workers)
    (tmp_path / "none" / "gigatoken").mkdir(parents=True)
    (tmp_path / "none" / "gigatoken" / "__init__.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path / "none"), *sys.path])
    command = [sys.executable, "-c", WITHOUT_GIGATOKEN, tmp_path / "other", *inputs]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True)
    reference = bytes_of(tmp_path / "one")
    assert bytes_of(tmp_path / "2") == bytes_of(tmp_path / "8") == reference
    assert bytes_of(tmp_path / "other") == reference


def packed(items: list[str], folder: Path) -> dict[str, Path]:
    """The same records in every container format."""
    lines = jsonl(items)
    table = pa.table({"id": range(len(items)), "text": items})
    files = {
        "jsonl": lines,
        "jsonl.gz": gzip.compress(lines[:1000]) + gzip.compress(lines[1000:]),
        "jsonl.zst": zstandard.compress(lines[:1000]) + zstandard.compress(lines[1000:]),
        "jsonl.bz2": bz2.compress(lines),
        "jsonl.xz": lzma.compress(lines),
    }
    found = {}
    for name, data in files.items():
        found[name] = folder / f"x.{name}"
        found[name].write_bytes(data)
    parquet.write_table(table, folder / "x.parquet", row_group_size=150)
    with ipc.new_file(str(folder / "x.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    with ipc.new_stream(str(folder / "y.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    with zipfile.ZipFile(folder / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("in/x.jsonl", lines)
    with tarfile.open(folder / "x.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("../../x.jsonl")
        info.size = len(lines)
        archive.addfile(info, io.BytesIO(lines))
    for name in ("x.csv", "x.tsv"):
        with (folder / name).open("w", newline="") as file:
            sheet = csv.writer(file, delimiter="\t" if name == "x.tsv" else ",")
            sheet.writerows([["id", "text"], *([i, text] for i, text in enumerate(items))])
    (folder / "x.csv.gz").write_bytes(gzip.compress((folder / "x.csv").read_bytes()))
    names = ("x.parquet", "x.arrow", "y.arrow", "x.zip", "x.tar.gz", "x.csv", "x.tsv", "x.csv.gz")
    return found | {name: folder / name for name in names}


def test_same_bytes_from_every_container(tmp_path: Path, small_units: None) -> None:
    items = [f'{text} "quoted, {i}"\n second line' for i, text in enumerate(texts(400))]
    (tmp_path / "in").mkdir()
    reference = None
    for name, path in packed(items, tmp_path / "in").items():
        run(tmp_path / name, path)
        found = bytes_of(tmp_path / name, manifest=False)
        reference = reference or found
        assert found == reference, name


def test_text_is_cut_the_same_in_a_stream(tmp_path: Path, small_units: None) -> None:
    text = "\n\n".join(texts(900)) + " ".join(f"no line end {i}" for i in range(6000))
    for name, data in {"a.txt": text.encode(), "b.txt.gz": gzip.compress(text.encode())}.items():
        (tmp_path / name).write_bytes(data)
        run(tmp_path / name[0], tmp_path / name)
    assert "".join(documents(tmp_path / "a", "train")) != ""
    assert bytes_of(tmp_path / "a", manifest=False) == bytes_of(tmp_path / "b", manifest=False)
    assert sum(map(len, everything(tmp_path / "a"))) == len(text)


def test_one_book_gives_both_splits(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(texts(4000)))
    manifest = run(tmp_path / "data", tmp_path / "book.txt", val_fraction=0.05)
    sizes = [len(text.encode()) for text in everything(tmp_path / "data")]
    assert manifest["splits"]["val"]["documents"] > 1
    assert np.median(sizes) == pytest.approx(8 << 10, rel=0.1) and max(sizes) < 33 << 10


def test_small_files_and_code_stay_whole(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "sub"
    folder.mkdir(parents=True)
    code = "\n\n".join(f"def f{i}():\n    return {i}" for i in range(9000))
    (folder / "long.py").write_text(code)
    (folder / "note.md").write_text("# short\n\nnote\n")
    for i in range(30):
        (folder / f"{i}.rst").write_text(f"page {i}")
    run(tmp_path / "data", tmp_path / "in")
    assert code in everything(tmp_path / "data")
    assert "# short\n\nnote\n" in everything(tmp_path / "data")


def test_html_gives_its_text(tmp_path: Path) -> None:
    pytest.importorskip("resiliparse")
    page = "<html><script>bad()</script><body><p>Good <b>text</b> {} here.</p></body></html>"
    for i in range(40):
        (tmp_path / f"{i}.html").write_text(page.format(i))
    deep = 20_000
    (tmp_path / "deep.html").write_text("<div>" * deep + "Deep text." + "</div>" * deep)
    (tmp_path / "odd.html").write_text("<div></b>" * deep + "Odd text.")  # never closed
    started = time.monotonic()
    run(tmp_path / "data", tmp_path)
    assert time.monotonic() - started < 10, "menus are not looked for so deep: 12 s at this depth"
    good = [f"Good text {i} here." for i in range(40)]
    assert everything(tmp_path / "data") == ["Deep text.", *sorted(good), "Odd text."]


@pytest.mark.parametrize(
    ("name", "codec", "text"),
    [
        ("Shift_JIS", "cp932", "これは①番目の、とても長い段落である。"),
        ("ISO-2022-JP", "iso2022_jp", "日本語の文章です。とても長い段落である。"),
        ("gb2312", "gb18030", "这是一个内容很长的中文页面。"),
        ("windows-1251", "cp1251", "Это русский текст на странице."),
        ("iso-8859-1", "cp1252", "Grüße — “häßlich”, sagte sie."),
        ("iso-8859-1", "utf-8", "Grüße aus Köln, stale declaration."),
    ],
)
def test_a_page_may_declare_its_encoding(tmp_path: Path, name: str, codec: str, text: str) -> None:
    pytest.importorskip("resiliparse")
    heads = (
        f'<meta charset="{name}">',
        f"<META http-equiv=Content-Type content='text/html; charset={name}'>",
        f'<?xml version="1.0" encoding="{name}"?>',
    )
    for number, head in enumerate(heads):
        page = f"{head}<title>t</title><body><p>{text} {number}</p></body>".encode(codec)
        (tmp_path / f"{number}.html").write_bytes(page)
    (tmp_path / "wrong.html").write_bytes(b"<meta charset=cp\xe9><p>caf\xe9</p>")
    manifest = run(tmp_path / "data", tmp_path, val_fraction=0)
    assert everything(tmp_path / "data") == [f"{text} {number}" for number in range(3)]
    assert [*manifest["rejects"]] == ["not valid UTF-8"]


def test_special_tokens_in_text_are_text(tmp_path: Path) -> None:
    items = [f"{i} <|endoftext|> <|pad|> inside" for i in range(50)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(items))
    run(tmp_path / "data", tmp_path / "a.jsonl")
    assert everything(tmp_path / "data") == sorted(items)
    ids = np.load(tmp_path / "data" / "train-00000.npy")
    assert (ids == EOT).sum() == len(documents(tmp_path / "data", "train"))


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("by", ["stdin", "file"])
def test_any_script_may_prepare(tmp_path: Path, by: str, guarded: bool) -> None:
    """Workers do not import the caller's main module, so it may be anything."""
    (tmp_path / "in.jsonl").write_bytes(jsonl(texts(20)))
    lines = [
        "from pathlib import Path",
        "from sota_transformer.data.prepare import prepare",
        "from sota_transformer.options import Prepare",
        "if __name__ == '__main__':" if guarded else "if True:",
        "    prepare(Prepare(inputs=('in.jsonl',), out=Path('data'), val_fraction=0.2, workers=2))",
    ]
    code, script = "\n".join(lines), tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, *([str(script)] if by == "file" else [])]
    done = subprocess.run(
        command, input=code, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(everything(tmp_path / "data")) == 20


def test_a_closed_output_pipe_is_no_failure(tmp_path: Path) -> None:
    """The summary comes last, if anybody still reads; the preparation itself has succeeded."""

    class Left(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    (tmp_path / "a.jsonl").write_bytes(jsonl(texts(900)))
    with contextlib.redirect_stdout(Left()), pytest.raises(BrokenPipeError):
        run(tmp_path / "data", tmp_path / "a.jsonl")
    assert len(everything(tmp_path / "data")) == 900


def test_members_that_were_read_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "CHUNK", 16 << 10)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(1500):
            archive.addfile(tarfile.TarInfo(f"{number}.png"))
    (source,), _ = find((str(tmp_path / "a.tar"),))
    tracemalloc.start()
    assert not list(streams.streams(source, lambda _: None))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400_000, "about 0.4 kB each would stay"


def test_progress_of_a_table_counts_bytes_not_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 8 << 10)
    monkeypatch.setattr(tables, "UNIT_BYTES", 8 << 10)
    path = tmp_path / "x.parquet"
    parquet.write_table(pa.table({"text": texts(300)}), path, row_group_size=100)
    (source,), _ = find((str(path),))
    cuts = units.cut([source], tmp_path, lambda _: None, lambda s: tables.probe(s, "text"))
    sizes = [segment.taken for segments in cuts for segment in segments]
    assert len(sizes) > 3
    assert source.size - len(sizes) <= sum(sizes) <= source.size


@pytest.mark.parametrize("waits", [False, True])
def test_what_another_process_appends_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    """Two append to one folder, the second just before the first takes its turn.

    One that `waits` looks for its turn in the work folder, which the other removes.
    """
    parts = [texts(100, seed=seed) for seed in range(3)]
    files = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for file, items in zip(files, parts, strict=True):
        file.write_bytes(jsonl(items))
    out, make_folder = tmp_path / "data", preparing.make_folder
    run(out, files[0])

    def late(path: Path) -> None:
        monkeypatch.undo()
        if waits:
            make_folder(path)
        run(out, files[1], append=True)
        if not waits:
            make_folder(path)

    monkeypatch.setattr(preparing, "make_folder", late)
    refused(75, "changed by another process", out=out, inputs=(files[2],), append=True)
    assert everything(out) == sorted(parts[0] + parts[1])
    run(out, files[2], append=True)
    assert everything(out) == sorted(itertools.chain(*parts))
