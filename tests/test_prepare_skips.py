"""What `prepare` skips or repairs, and how it says so."""

import gzip
import json
import os
import re
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import ipc, parquet

from sota_transformer.data.exclude import write_excluded
from sota_transformer.errors import SotaError
from sota_transformer.inference.tokenizer_files import huggingface_files
from tests.preparing import everything, jsonl, refused, run, texts


def test_broken_encodings_are_dropped_or_repaired(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [b'{"text": "caf\xe9 one"}', b'{"text": "lone \\ud800 two"}', b'{"text": "good"}']
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    (folder / "b.md").write_bytes(b"caf\xe9 three")
    (folder / "c.csv").write_bytes(b"id,text\n1,caf\xe9 four\n")
    (folder / "d.html").write_bytes(b"<html><body><p>caf\xe9 five</p></body></html>")
    (folder / "e.txt").write_bytes("caf six".encode("utf-16") + b"\0")
    rows = pa.array([b"before", b"caf\xe9 seven", b"behind", b"as bytes"], pa.binary())
    parquet.write_table(pa.table({"text": rows[:3].view(pa.string())}), folder / "f.parquet")
    category = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2]), rows[:3].view(pa.string()))
    for number, column in enumerate((rows[:3].view(pa.string()), rows[3:], category)):
        batch = pa.record_batch({"text": column})
        with ipc.new_file(str(folder / f"g{number}.arrow"), batch.schema) as file:
            file.write_batch(batch)
    good = ["as bytes", "before", "behind", "good"]
    run(tmp_path / "dropped", folder, val_fraction=0)
    assert everything(tmp_path / "dropped") == good
    manifest = run(tmp_path / "replaced", folder, val_fraction=0, bad_text="replace")
    numbers = ("one", "three", "four", "five", "seven")
    taken = [*(f"caf\ufffd {number}" for number in numbers), "lone \ufffd two", "caf six\ufffd"]
    assert everything(tmp_path / "replaced") == sorted([*taken, *good])
    counts = {reason: entry["count"] for reason, entry in manifest["rejects"].items()}
    told = "; kept, with U+FFFD for the invalid parts"
    assert counts == {
        f"not valid UTF-8{told}": 8,
        f"lone surrogates, not valid Unicode{told}": 1,
        "exact duplicate": 6,
    }
    assert all(manifest["rejects"][reason]["examples"] for reason in counts if told in reason)


def test_long_names_and_many_do_not_flood_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path.joinpath("in", *["d" * 200] * 5)
    folder.mkdir(parents=True)
    (folder / "empty.txt").touch()
    (folder / "a.txt").write_text("some text")
    files = [tmp_path / f"{number}.txt" for number in range(24)]
    for number, path in enumerate(files):
        path.write_text(f"text {number}")  # 2 tokens and end-of-text
    run(tmp_path / "out", tmp_path / "in", *files, val_fraction=0)
    lines = capsys.readouterr().out.split("\n")
    line = next(line for line in lines if "empty file" in line)
    assert len(line) < 250 and line.endswith("d/empty.txt")
    assert lines[21].split() == ["5", "more", "5", "0.00", "15"]


def test_junk_is_reported_and_the_rest_kept(tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    (junk / "x.jsonl").mkdir(parents=True)
    good = texts(60)
    lines = [
        *(json.dumps({"text": text}).encode() for text in good),
        b'{"text": "lone \\ud800 surrogate"}',
        b'{"text": "nul \\u0000 byte"}',
        b'{"text": 1e999}',
        b'{"text": ""}',
        b'{"text": " \\n\\t "}',
        b'{"other": "field"}',
        b'{"n": ' + b"9" * 5000 + b', "text": "big integers are fine"}',
        b"[" * 100_000,
        b"not json",
        b'"a string"',
        b'\xff\xfe{"text": "x"}',
        b'{"text": "bad \xff byte"}',
        b"",
        b'{"text": "NaN is fine", "x": NaN}\r',
    ]
    (junk / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    (junk / "empty.txt").touch()
    (junk / "bad.txt").write_bytes(b"latin \xe9\xe8")
    (junk / "binary.txt").write_bytes(bytes(range(256)) * 10)
    (junk / "picture.png").write_bytes(b"\x89PNG")
    (junk / "cut.jsonl.gz").write_bytes(gzip.compress(jsonl(texts(500, seed=9)))[:-3000])
    (junk / "cut.jsonl.zst").write_bytes(zstandard.compress(jsonl(texts(500, seed=8)))[:-9])
    (junk / "bad.parquet").write_bytes(b"PAR1" + b"junk" * 50 + b"PAR1")
    (junk / "bad.arrow").write_bytes(b"ARROW1" + b"junk" * 50)
    with zipfile.ZipFile(junk / "nested.zip", "w") as archive:
        archive.writestr("inner.zip", b"PK")
        archive.writestr("ok.txt", "text in a zip")
    (junk / "story.gz").write_bytes(gzip.compress(b"a text"))
    (junk / "bad.zip").write_bytes(b"PK\x03\x04 nothing")
    (junk / "loop").symlink_to(junk)
    (junk / "out.txt").symlink_to("/etc/hostname")
    os.mkfifo(junk / "pipe.txt")
    (junk / "utf16.txt").write_bytes("UTF-16 is announced".encode("utf-16"))
    manifest = run(tmp_path / "data", junk, workers=2)
    found = everything(tmp_path / "data")
    assert set(good) <= set(found)
    assert {"big integers are fine", "NaN is fine", "text in a zip", "UTF-16 is announced"} <= set(
        found
    )
    reasons = {reason: entry["count"] for reason, entry in manifest["rejects"].items()}
    for reason, count in {
        "lone surrogates, not valid Unicode": 1,
        "NUL bytes, probably not text": 2,
        "field 'text' is not text": 1,
        "empty document": 2,
        "no field 'text'": 1,
        "nested too deep": 1,
        "JSON, but not an object": 1,
        "empty file": 1,
        ".png file is not a text format": 1,
        "file without an extension, in .gz is not a text format": 1,
        "archive inside an archive; unpack it first": 1,
        "damaged archive": 1,
        "damaged stream; only its readable start was kept": 2,
        "damaged table; only its readable start was kept": 2,
        "link to a folder": 1,
        "broken link, or a link out of the folder": 1,
        "not a regular file": 1,
    }.items():
        assert reasons.get(reason, 0) == count, (reason, reasons)
    assert reasons["not valid UTF-8"] == 3
    assert all(entry["examples"] for entry in manifest["rejects"].values())


def test_a_model_folder_among_the_texts_is_skipped(tmp_path: Path) -> None:
    """Its merges alone would outweigh the text in many folders."""
    model = tmp_path / "texts" / "model"
    model.mkdir(parents=True)
    (tmp_path / "texts" / "a.jsonl").write_bytes(jsonl(texts(60)))
    for name, data in huggingface_files(512).items():
        (model / name).write_bytes(data)
    manifest = run(tmp_path / "data", tmp_path / "texts")
    assert everything(tmp_path / "data") == sorted(texts(60))
    assert manifest["rejects"]["a model; its merges are not text"]["count"] == 1


@pytest.mark.parametrize(
    "name", ["a.rtf", "a.PDF", "a.docx", "a.epub", "a.rtf.gz", "a.warc.gz", "a.MBOX", "a.7z"]
)
def test_a_document_to_convert_is_named_with_what_to_do(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is inside would be taken for text, for JSON lines or for damage."""
    path, out = tmp_path / "in" / name, tmp_path / "data"
    path.parent.mkdir()
    path.write_bytes(b"{\\rtf1 some text}")
    ending, advice = f"{name[1:].lower()} file", "convert it to text first, as with pandoc"
    advice = "unpack it first" if name == "a.7z" else advice
    with pytest.raises(SotaError, match=f"{name}: {ending}; {advice}") as caught:
        run(out, path)
    assert caught.value.code == 66 and "if you name" not in str(caught.value)  # it was named
    refused(66, f"{name}: {ending} is not a text format; {advice}", out=out, inputs=(path.parent,))
    (tmp_path / "b.txt").write_text("another text " * 20)
    both = (str(tmp_path / "b.txt"), str(path))
    with pytest.raises(SotaError, match=f"{name}: {ending}; {advice}"):
        write_excluded(both, "text", tmp_path / "grams.npy")
    write_excluded((both[0], str(path.parent)), "text", tmp_path / "grams.npy")
    assert "--exclude ignores 1 file; the first is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("codec", "advice"),
    [
        ("cp932", "such as cp1252, cp932 or gb18030: iconv -f"),
        ("iso2022_jp", "such as iso-2022-jp: iconv -f"),
        ("utf-16-le", "UTF-16 without a"),
    ],
)
def test_text_in_another_encoding_comes_with_advice_for_any(
    tmp_path: Path, codec: str, advice: str
) -> None:
    """iconv turns Japanese into garbage without complaint if told that it is cp1252."""
    (tmp_path / "a.txt").write_bytes("吾輩は猫である。a".encode(codec))
    refused(65, advice, out=tmp_path / "data", inputs=(tmp_path / "a.txt",))


def test_a_folder_of_other_endings_comes_with_advice(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.log").write_text("GET / 200\n")
    said = "a.log: .log file is not a text format", "is read if you name the files"
    refused(66, *said, out=tmp_path / "data", inputs=(tmp_path / "in",))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "parquet", "arrow"])
def test_a_field_of_another_name_is_told(tmp_path: Path, ending: str) -> None:
    """Published texts are in `content`, `raw_content`, `body` and others."""
    path = tmp_path / f"a.{ending}"
    table = pa.table({"id": ["1", "2"], "raw_content": texts(2)})
    if ending == "parquet":
        parquet.write_table(table, path)
    elif ending == "arrow":
        with ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    else:
        rows = [table.column_names, *zip(*table.to_pydict().values(), strict=True)]
        mark = "," if ending == "csv" else "\t"
        lines = map(json.dumps, table.to_pylist()) if ending == "jsonl" else map(mark.join, rows)
        path.write_text("\n".join(lines))
    told = "(has 'id', 'raw_content'); name the one that holds the text with --text-field"
    refused(65, told, out=tmp_path / "data", inputs=(path,))


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl"])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_of_records_is_not_one_document(
    tmp_path: Path, name: str, indent: int | None
) -> None:
    """As pandas, polars, DuckDB and Slack write it."""
    data = json.dumps([{"text": text} for text in texts(50)], indent=indent).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    told = "each document has to be one line; for an array: jq -c '.[]'"
    refused(65, told, out=tmp_path / "data", inputs=(path,))
    if indent and not name.endswith("gz"):  # to --exclude, a compact one is its strings
        with pytest.raises(SotaError, match=re.escape(told)):
            write_excluded((str(path),), "text", tmp_path / "grams.npy")


def test_what_datasets_cached_beside_a_data_set_is_no_more_text(tmp_path: Path) -> None:
    """`map` after `load_from_disk` writes changed copies of every document there."""
    folder = tmp_path / "set"
    folder.mkdir()
    names = ("cache-4d1cf2f57fd48898", "cache-5cfb26ceba8d7137_00000_of_00002", "data-00000-of-1")
    for change, name in zip((str.lower, str.upper, str), names, strict=True):
        table = pa.table({"text": [change(text) for text in texts(50)]})
        with ipc.new_stream(folder / f"{name}.arrow", table.schema) as file:
            file.write_table(table)
    manifest = run(tmp_path / "data", folder)
    assert everything(tmp_path / "data") == sorted(texts(50))
    assert [entry["count"] for entry in manifest["rejects"].values()] == [2]
    run(tmp_path / "named", folder / f"{names[1]}.arrow")
    assert everything(tmp_path / "named") == sorted(map(str.upper, texts(50)))


def test_a_pointer_to_a_file_is_not_its_text(tmp_path: Path) -> None:
    """What `git clone` leaves of a data set without Git LFS."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
    for name in ("a.txt", "b.jsonl", "c.jsonl.zst", "d.parquet"):
        (tmp_path / name).write_text(pointer)
    refused(66, "a.txt: Git LFS pointer; get", out=tmp_path / "data", inputs=(tmp_path,))


def test_what_is_not_damaged_but_not_read_says_so(tmp_path: Path) -> None:
    """Reddit's archives are packed with `zstd --long=31`."""
    how = zstandard.ZstdCompressionParameters(window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=how).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(jsonl(texts(9))) + packer.flush())
    (tmp_path / "b.feather").write_bytes(b"FEA1" + bytes(40) + b"FEA1")
    for name, told in (("a.jsonl.zst", "unpack it with zstd -d --long=31"), ("b.feather", "write")):
        refused(65, told, out=tmp_path / "data", inputs=(tmp_path / name,))
